"""Prints an anatomy: stacks, layers in groups of equal make, and each role with its module, shape and channels."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace

from surgery.anatomy.parts import Anatomy, Heads, Part, Stack

UNSAID = ("block", "edge")  # what the parts in them tell already
Row = tuple[str, str, str, str]


def show(anatomy: Anatomy) -> str:
    """A text of one line for each role of each group of layers, in execution order."""
    lines = [anatomy.model]
    stacks = {stack.name: stack for stack in anatomy.stacks}
    pending: list[Part] = []
    sections: list[tuple[str, list[Row]]] = []
    told: set[str] = set()
    for part in [*anatomy.parts, None]:
        if part is not None and part.stack is None:
            pending.append(part)
            continue
        if part is not None and part.stack in told:
            continue
        if pending:
            sections.append(("", [row(item, item.path) for item in pending if item.kind not in UNSAID]))
            pending = []
        if part is not None and part.stack is not None:
            told.add(part.stack)
            sections += layers(anatomy, stacks[part.stack])
    rows = [row for _, section in sections for row in section]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    for title, section in sections:
        if title:
            lines.append(title)
        for cells in section:
            padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=False)]
            indent = "    " if title else "  "
            lines.append((indent + "  ".join([*padded, cells[3]])).rstrip())
    return "\n".join(lines)


def layers(anatomy: Anatomy, stack: Stack) -> list[tuple[str, list[Row]]]:
    """One section for each group of layers of equal make."""
    members: dict[int, list[Part]] = {index: [] for index in range(stack.depth)}
    for part in anatomy.parts:
        if part.stack == stack.name and part.layer is not None and part.kind not in UNSAID:
            members[part.layer].append(part)
    groups: dict[tuple[Row, ...], list[int]] = {}
    for index, parts in members.items():
        rows = tuple(row(part, starred(part, index)) for part in parts)
        groups.setdefault(rows, []).append(index)
    sections = []
    for rows, indices in groups.items():
        where = f"layer{'s' if len(indices) > 1 else ''} {ranges(indices)}"
        sections.append(
            (f"  {stack.name} {where} of {stack.depth}" if stack.depth > 1 else f"  {stack.name}", list(rows))
        )
    return sections


def starred(part: Part, index: int) -> str:
    """The module path with `*` for the layer's index."""
    names = part.path.split(".")
    for place, name in enumerate(names):
        if name == str(index):
            return ".".join([*names[:place], "*", *names[place + 1 :]])
    return part.path


def row(part: Part, path: str) -> Row:
    part = replace(part, path=path)
    name = part.path if part.parameter in ("", "weight") else f"{part.path}.{part.parameter}".lstrip(".")
    size = " x ".join(map(str, part.shape))
    return part.role, name, size, "  ".join(filter(None, notes(part)))


def notes(part: Part) -> Iterable[str]:
    if part.heads:
        yield geometry(part.heads)
    if part.channels is not None:
        yield f"channels {channels(part.channels)}"
    if part.bias:
        yield "bias"
    if part.transposed:
        yield "stored transposed"
    if part.tied:
        yield "tied to " + ", ".join(part.tied)


def geometry(heads: Heads) -> str:
    count = f"{heads.query} heads"
    if heads.key_value != heads.query:
        count += f", {heads.key_value} for keys and values"
    width = f" of {heads.key_width}" if heads.key_width == heads.value_width else ""
    return count + (width or f", keys of {heads.key_width}, values of {heads.value_width}")


def channels(runs: tuple[tuple[int, int], ...]) -> str:
    """`0..768`, or where they interleave `64 runs of 64 every 192 from 0` (the end is exclusive)."""
    if len(runs) < 3:
        return ", ".join(f"{start}..{stop}" for start, stop in runs)
    lengths = {stop - start for start, stop in runs}
    steps = {after[0] - before[0] for before, after in itertools.pairwise(runs)}
    if len(lengths) == 1 and len(steps) == 1:
        return f"{len(runs)} runs of {lengths.pop()} every {steps.pop()} from {runs[0][0]}"
    return f"{len(runs)} runs, {sum(stop - start for start, stop in runs)} in all, {runs[0][0]}..{runs[-1][1]}"


def ranges(indices: list[int]) -> str:
    """`0..11`, `0, 5, 9`, `0..10 even`."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    if len(runs) > 2 and all(b - a == 2 for a, b in itertools.pairwise(indices)):
        return f"{indices[0]}..{indices[-1]} {'odd' if indices[0] % 2 else 'even'}"
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)
