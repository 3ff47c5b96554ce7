"""A heat strip in the terminal: a row for each role, a cell for each layer, fuller and warmer where more is zero."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from surgery.compiler.zeros import Cell

BLOCKS = "▁▂▃▄▅▆▇█"
RAMP = (27, 33, 37, 71, 142, 178, 208, 196)
"""Colours of 256, from blue to red."""
NONE, UNKNOWN = ".", "?"


def strips(cells: Sequence[Cell], blocks: bool) -> Iterator[str]:
    """Lines for each stack. blocks: in block characters and colours; else tenths as digits, 9 being 90% and more."""
    for stack in dict.fromkeys(cell.stack for cell in cells if cell.layer is not None):
        mine = [cell for cell in cells if cell.stack == stack and cell.layer is not None]
        depth = 1 + max(cell.layer or 0 for cell in mine)
        width = max(len(cell.role) for cell in mine)
        yield f"  Zeros      {stack or 'model'} layers 0..{depth - 1}, {'' if blocks else 'in tenths, '}of each weight"
        yield f"    {' ' * width}  {_ruler(depth)}"
        for role in dict.fromkeys(cell.role for cell in mine):
            row = [cell for cell in mine if cell.role == role]
            yield f"    {role.ljust(width)}  {_row(row, depth, blocks)}  {_total(row)}"


def in_blocks(stream: TextIO | None = None) -> bool:
    """Whether block characters and colours are wanted there: a terminal that has them, and nobody has said no."""
    stream = sys.stdout if stream is None else stream
    try:
        BLOCKS.encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def _ruler(depth: int) -> str:
    """The number of every tenth layer where it begins."""
    return "".join(str(layer).ljust(10) for layer in range(0, depth, 10))[:depth].rstrip()


def _row(row: Sequence[Cell], depth: int, blocks: bool) -> str:
    shares: list[float | str | None] = [NONE] * depth
    for layer in range(depth):
        here = [cell for cell in row if cell.layer == layer]
        if here:
            shares[layer] = _share(here)
    return "".join(_cell(share, blocks) for share in shares)


def _share(cells: Sequence[Cell]) -> float | None:
    """Of all of them together; None where one is not known."""
    counts = [cell.zeros for cell in cells]
    known = [count for count in counts if count is not None]
    return sum(known) / max(1, sum(cell.size for cell in cells)) if len(known) == len(counts) else None


def _cell(share: float | str | None, blocks: bool) -> str:
    if not isinstance(share, float):
        return UNKNOWN if share is None else NONE
    if not blocks:
        return str(min(9, int(share * 10)))
    level = min(len(BLOCKS) - 1, int(share * len(BLOCKS)))
    return f"\x1b[38;5;{RAMP[level]}m{BLOCKS[level]}\x1b[0m"


def _total(row: Sequence[Cell]) -> str:
    share = _share(row)
    return "known with the weights" if share is None else f"{share:.1%}"
