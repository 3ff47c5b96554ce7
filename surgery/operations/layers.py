"""What statements about whole layers have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from surgery.errors import PlanError
from surgery.operations.base import Operation, Phase

if TYPE_CHECKING:
    from surgery.anatomy.parts import Kind, Part


@dataclass(frozen=True, kw_only=True)
class OfLayers(Operation):
    """Base of statements that change which layers a stack has."""

    phase: ClassVar[Phase] = "depth"
    acts_on: ClassVar[tuple[Kind, ...]] = ("block",)
    leads: ClassVar[bool] = True
    attaches: ClassVar[bool] = False

    def narrowed(self, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        """The layers among blocks. Error: PlanError S131 where there are none."""
        found = tuple(part for part in parts if part.role == "layer")
        if not found:
            raise PlanError.of(
                "S131",
                f"`{self.verb}` takes whole layers, and {parts[0].path if parts else 'this model'} is not one",
                help="write `layers 20..23`; each layer has to be one module of a list",
            )
        return found

    def claims(self, name: str | None) -> tuple[str, ...]:
        return ("layer",)
