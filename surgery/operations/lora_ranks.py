"""Ranks of a low-rank adapter's matrices: an entry of a table for each layer, or as many as a budget pays for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import ROUND_CEILING, Context, Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, TypeVar

from surgery.errors import PlanError

if TYPE_CHECKING:
    from surgery.anatomy.parts import Part

Entry = TypeVar("Entry", int, float)


def key(part: Part) -> str:
    """What tells a part from the others of a statement."""
    name = f"{part.path}.{part.parameter}"
    return name if part.channels is None else f"{name} {part.role}"


def matrices(part: Part) -> tuple[int, int, int]:
    """How many matrices a part has, and the (out, in) of each; a lookup takes its vocabulary to its width."""
    if part.kind == "experts":
        channels = ((0, part.shape[1]),) if part.channels is None else part.channels
        return part.shape[0], sum(stop - start for start, stop in channels), part.shape[2]
    return (1, part.shape[1], part.shape[0]) if part.kind == "lookup" else (1, part.width, part.shape[1])


def numbers(part: Part, rank: int, dora: bool = False) -> int:
    """How many numbers A and B of this rank have there, and DoRA's magnitudes."""
    count, out, wide = matrices(part)
    return count * (rank * (out + wide) + dora * out)


def by_layer(table: Sequence[Entry], parts: Sequence[Part], what: str) -> dict[str, Entry]:
    """Entry i for the parts of the i-th layer that the statement acts on. PlanError S119 where they do not match."""
    outside = [part.path for part in parts if part.layer is None]
    if outside:
        raise PlanError.of(
            "S119",
            f"a table of {what}s has one entry for each layer, and {outside[0]} is in no layer",
            help="leave it out with `except`, or give it a statement of its own",
        )
    layers = list(dict.fromkeys((part.stack, part.layer) for part in parts))
    if len(layers) != len(table):
        raise PlanError.of(
            "S119",
            f"the table of {what}s has {len(table)} entries, and the statement acts on {len(layers)} layers",
            help="write one entry for each layer, or name fewer layers with `in layers`",
        )
    entries = dict(zip(layers, table, strict=True))
    return {key(part): entries[part.stack, part.layer] for part in parts}


def within(budget: float, parts: Sequence[Part], parameters: int, dora: bool) -> dict[str, int]:
    """The largest equal rank that the budget pays for, then one more wherever it still fits, in the model's order.

    budget: share of all numbers, the adapter's included, that it may have. No rank exceeds its matrix's.
    Error: PlanError S118 when even rank 1 does not fit.
    """
    share = Fraction(repr(budget))
    allowed = int(share * parameters / (1 - share))
    full = [min(matrices(part)[1:]) for part in parts]

    def total(rank: int) -> int:
        return sum(numbers(part, min(rank, most), dora) for part, most in zip(parts, full, strict=True))

    if total(1) > allowed:
        raise PlanError.of(
            "S118",
            f"rank 1 at {len(parts)} places is {total(1):,} numbers, and the budget pays for {allowed:,}",
            help=f"the least budget possible is {_percent(Fraction(total(1), parameters + total(1)))}; "
            "or select fewer places",
        )
    rank, beyond = 1, max(full) + 1
    while beyond - rank > 1:
        middle = (rank + beyond) // 2
        rank, beyond = (middle, beyond) if total(middle) <= allowed else (rank, middle)
    ranks, left = {}, allowed - total(rank)
    for part, most in zip(parts, full, strict=True):
        more = numbers(part, 1) if rank < most else left + 1
        ranks[key(part)] = min(rank, most) + (more <= left)
        left -= more if more <= left else 0
    return ranks


def _percent(share: Fraction) -> str:
    """With three digits, rounded up: a budget that is enough."""
    context = Context(prec=3, rounding=ROUND_CEILING)
    return f"{context.divide(Decimal(100 * share.numerator), Decimal(share.denominator)).normalize(context):f}%"


def told(ranks: Mapping[str, int]) -> str:
    """`rank 8 at 12 places, 9 at 4`."""
    counts = {rank: list(ranks.values()).count(rank) for rank in sorted(set(ranks.values()))}
    first, *others = (f"{rank} at {count}" for rank, count in counts.items())
    return ", ".join([f"rank {first} place{'s' * (next(iter(counts.values())) > 1)}", *others])
