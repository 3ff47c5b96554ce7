"""Freeze tensors of the base: what no `train` statement gets, whatever the order of the statements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from surgery.operations.base import Granularity, Operation, Phase
from surgery.operations.train import TENSORS, whole_only

if TYPE_CHECKING:
    from typing import Any

    from surgery.anatomy.parts import Anatomy, Kind, Part


@dataclass(frozen=True, kw_only=True)
class Freeze(Operation):
    """Take tensors out of what `train` says: `train layers -2..-1 ; freeze norm`.

    It selects as `train` does. A tensor in two places is frozen in both. What other methods add stays trained.
    """

    verb: ClassVar[str] = "freeze"
    phase: ClassVar[Phase] = "train"
    acts_on: ClassVar[tuple[Kind, ...]] = TENSORS
    leads: ClassVar[bool] = True
    granularity: ClassVar[Granularity] = "tensor"
    freezes: ClassVar[bool] = True
    attaches: ClassVar[bool] = False

    def sees(self, anatomy: Anatomy, model: Any) -> Anatomy:
        from surgery.anatomy.tensors import tensors

        return tensors(anatomy, model, new=True)

    def fits(self, part: Part) -> str | None:
        return whole_only(part)

    def claims(self, name: str | None) -> tuple[str, ...]:
        return ()

    def rewrites(self, part: Part) -> bool:
        return False
