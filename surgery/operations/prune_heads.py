"""Attention heads are cut out (Michel et al. 2019), or whole groups of heads that share keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from surgery.operations.base import Flag, flag
from surgery.operations.structured import Structured

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from surgery.anatomy.groups import Group
    from surgery.graph.cutting import Cut
    from surgery.operations import unit_scores
else:
    from surgery.lazy import lazy

    unit_scores = lazy("surgery.operations.unit_scores")


@dataclass(frozen=True, kw_only=True)
class PruneHeads(Structured):
    """Cut whole attention heads out: `prune heads 25% by sensitivity using "calibration.jsonl" on attn`.

    A head is its rows of q, k and v, their biases, and its columns of o. Where query heads share keys and values, what
    goes is a key-value group with all its query heads; with `query`, or where all share the same, query heads alone, as
    many of each group. The share has to be a whole number of them: an error lists what can be had, `nearest` takes the
    nearest. What is left computes what the whole does with those heads at zero.
    """

    verb: ClassVar[str] = "prune heads"
    unit: ClassVar[Literal["heads"]] = "heads"
    readers: ClassVar[tuple[str, ...]] = ("attn.o", "cross.o")
    place: ClassVar[str] = "an attention"

    query: Flag = flag("query heads alone, as many of each key-value group")

    def alone(self, group: Group) -> bool:
        """Whether query heads go, and their keys and values stay."""
        return bool(group.of) and (self.query or group.sharing == 1)

    def left(self, group: Group) -> tuple[int, ...]:
        if not group.of:
            return tuple(range(self.count_left(group.count, group, exact=True)))
        if self.alone(group):
            each = self.count_left(group.count // group.sharing, group, exact=True)
            return tuple(sorted(unit for share in range(group.sharing) for unit in members(group, share)[:each]))
        shares = self.count_left(group.sharing, group, exact=True)
        return tuple(unit for unit, share in enumerate(group.of) if share < shares)

    def best(self, cut: Cut, units: Tensor, shared: Tensor) -> tuple[int, ...]:
        group = cut.group
        if not group.of:
            return super().best(cut, units, shared)
        heads = [members(group, share) for share in range(group.sharing)]
        if self.alone(group):
            gone = (group.count - len(cut.kept)) // group.sharing
            kept = [unit_scores.all_but(gone, units[some]).tolist() for some in heads]
            pairs = [pair for some, stays in zip(heads, kept, strict=True) for pair in zip(some, stays, strict=True)]
            return tuple(sorted(unit for unit, stay in pairs if stay))
        totals = shared.index_add(0, units.new_tensor(group.of).long(), units)
        stays = unit_scores.all_but(group.sharing - len(cut.shared), totals).tolist()
        return tuple(unit for unit, share in enumerate(group.of) if stays[share])

    def numbers(self, cut: Cut) -> Iterable[tuple[float, float]]:
        yield cut.group.count, len(cut.kept)
        if cut.group.of and cut.group.sharing != len(cut.shared):
            yield cut.group.sharing, len(cut.shared)


def members(group: Group, share: int) -> list[int]:
    """The query heads of a key-value group."""
    return [unit for unit, of in enumerate(group.of) if of == share]
