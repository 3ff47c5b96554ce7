"""Sparse upcycling: a dense feed-forward block becomes a mixture of copies of itself (Komatsuzaki et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from surgery.errors import PlanError
from surgery.lazy import lazy
from surgery.operations.base import Count, Number, Operation, Phase, Share, option, quantity

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from surgery.anatomy.parts import Anatomy, Kind, Part
    from surgery.graph import experts, upcycling
    from surgery.graph.shaping import Shaping
else:
    experts = lazy("surgery.graph.experts")
    upcycling = lazy("surgery.graph.upcycling")


@dataclass(frozen=True, kw_only=True)
class Moe(Operation):
    """A mixture of experts in place of a feed-forward block: each expert a copy of it, and a router that picks a few.

    y = sum of w_e f_e(x) over the `top` experts of a token. The weights w, a softmax over those, sum to one: the model
    is unchanged at the start, to rounding, whatever the router says. In training a transformers model's loss has the
    balancing loss and the z-loss in it; for others `surgery.auxiliary_loss(model)` gives them. Padding is routed as any
    token. Statements that do not reshape the model find `experts` and `router` there: `train experts, router`.
    """

    verb: ClassVar[str] = "moe"
    phase: ClassVar[Phase] = "route"
    acts_on: ClassVar[tuple[Kind, ...]] = ("block", "projection")
    sign: ClassVar[str] = "+"
    attaches: ClassVar[bool] = False

    experts: Count = quantity("how many experts", unit="experts", at_least=1)
    top: Count = option("how many of them each token takes", default=2, at_least=1)
    balance: Number = option(
        "coefficient of the loss that spreads the tokens over the experts", default=0.01, at_least=0
    )
    z: Number = option("coefficient of the loss that keeps the router's logits small", default=0.001, at_least=0)
    noise: Share = option(
        "how far the router's input is scaled up and down at random in training", default=0.0, below=1
    )

    def validate(self) -> Iterable[tuple[str, str, str]]:
        if self.top > self.experts:
            yield (
                "top",
                f"{self.top} experts for each token, and there are {self.experts}",
                f"at most `top {self.experts}`",
            )

    def narrowed(self, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        blocks = tuple(part for part in parts if part.role == "ffn" and part.kind == "block")
        has = {(part.stack, part.layer) for part in blocks}
        for part in parts:
            if part.role.startswith("ffn.") and (part.stack, part.layer) not in has:
                raise PlanError.of(
                    "S134",
                    f"no experts can be made of the ffn around {part.path}: it has no module of its own",
                    help="leave it out with `except`",
                )
        if not blocks:
            raise PlanError.of("S134", "`moe` takes feed-forward blocks, and none is selected", help="write `on ffn`")
        return blocks

    def claims(self, name: str | None) -> tuple[str, ...]:
        return ("feed-forward block",)

    @property
    def on_merge(self) -> str:
        return "stays"

    def promises(self) -> tuple[str, ...]:
        return ("experts_agree",)

    def warnings(self, parts: Sequence[Part], anatomy: Anatomy, model: Any) -> Iterable[str]:
        for part in parts:
            reason = upcycling.fault(part, anatomy, model)
            if reason:
                raise PlanError.of(
                    "S134", f"no experts can be made of {part.path}: {reason}", help="leave it out with `except`"
                )
        return ()

    def reshape(self, parts: Sequence[Part], shaping: Shaping) -> None:
        routing = experts.Routing(self.experts, self.top, self.balance, self.z, self.noise)
        for part in parts:
            upcycling.upcycle(part, shaping, routing)
        shaping.beyond_configuration("a mixture of experts")
