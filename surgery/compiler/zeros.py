"""Shares of zeros that a plan will make, by role and layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from surgery.anatomy.parts import Part
    from surgery.compiler.plan import Plan


@dataclass(frozen=True)
class Cell:
    """A weight, or the rows of one, and how many of its numbers are zero: None where only weights tell."""

    role: str
    stack: str | None
    layer: int | None
    zeros: int | None
    size: int

    @classmethod
    def of(cls, part: Part, zeros: int | None) -> Cell:
        return cls(part.role, part.stack, part.layer, zeros, part.width * part.shape[1])


def planned(plan: Plan) -> list[Cell]:
    """What masks make zero, in the model's order; nothing where the plan has none."""
    places = [(step, part) for step in plan.steps if step.operation.phase == "mask" for part in step.parts]
    order = {(part.path, part.parameter): index for index, part in enumerate(plan.anatomy.parts)}
    places.sort(key=lambda place: order.get((place[1].path, place[1].parameter), len(order)))
    return [Cell.of(part, step.operation.zeroed(part)) for step, part in places if len(part.shape) == 2]
