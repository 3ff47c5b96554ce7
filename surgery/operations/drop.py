"""Whole layers are left out; the others close up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from surgery.errors import PlanError
from surgery.lazy import lazy
from surgery.operations.layers import OfLayers

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from surgery.anatomy.parts import Anatomy, Part
    from surgery.graph import depth
    from surgery.graph.shaping import Shaping
else:
    depth = lazy("surgery.graph.depth")


@dataclass(frozen=True, kw_only=True)
class Drop(OfLayers):
    """Leave whole layers out: `drop layers 20..23`.

    The layers that stay keep their weights and are numbered anew. All statements that do not reshape the model speak of
    the layers that are left.
    """

    verb: ClassVar[str] = "drop"
    sign: ClassVar[str] = "-"

    def warnings(self, parts: Sequence[Part], anatomy: Anatomy, model: Any) -> Sequence[str]:
        gone = {(part.stack, part.layer) for part in parts}
        for stack in anatomy.stacks:
            if all((stack.name, index) in gone for index in range(stack.depth)):
                raise PlanError.of(
                    "S131", f"`{self.verb}` would leave no layer of {stack.path}", help="leave one at least"
                )
        for part in anatomy.parts:
            if part.role == "position" and (part.stack, part.layer) in gone:
                raise PlanError.of(
                    "S131",
                    f"layer {part.layer} has the table of positions that the other layers read ({part.path})",
                    help="drop other layers",
                )
        return ()

    def reshape(self, parts: Sequence[Part], shaping: Shaping) -> None:
        for stack in shaping.anatomy.stacks:
            gone = {part.layer for part in parts if part.stack == stack.name}
            if gone:
                standing = shaping.order(stack)
                depth.reorder(shaping, stack, [place for place, index in enumerate(standing) if index not in gone])
