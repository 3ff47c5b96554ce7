"""IA3: learned vectors rescale keys, values and the feed-forward network's inner activation (Liu et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from surgery.language.selector import Role, Selector, Union
from surgery.operations.base import Operation, Phase, Word, kind

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from surgery.anatomy.parts import Kind, Part
    from surgery.graph.site import Site

SELECTOR = Union((Role("attn.k"), Role("attn.v"), Role("ffn.down")))


@dataclass(frozen=True, kw_only=True)
class Ia3(Operation):
    """Rescale activations by learned vectors (IA3, Liu et al. 2022): l_k * k, l_v * v, l_ff * inner activation.

    The vectors are ones at the start. Of `ffn.down` the input is multiplied, which is the ffn's inner activation; of
    every other projection the output, on a fused one only the channels of the role; `ia3 input` and `ia3 output` say it
    of any. A merge scales rows and bias, or columns, so that what is pruned stays zero.
    """

    verb: ClassVar[str] = "ia3"
    phase: ClassVar[Phase] = "attach"
    acts_on: ClassVar[tuple[Kind, ...]] = ("projection",)
    default_selector: ClassVar[Selector | None] = SELECTOR
    keeps_zeros: ClassVar[bool] = True

    side: Word | None = kind(
        "what is multiplied, whatever the role of the projection", default=None, choices=("input", "output")
    )

    def of_input(self, part: Part) -> bool:
        """Whether a part's input is multiplied, and not its output."""
        return self.side == "input" or (self.side is None and part.role == "ffn.down")

    def fits(self, part: Part) -> str | None:
        if part.role == "linear" and self.side is None:
            return "whether to scale its input or its output depends on its role: select it by one, or say `ia3 input`"
        if self.side == "input" and part.channels is not None:
            return "only some rows of a fused projection are selected, and all of them read one input: select it whole"
        return None

    def promises(self) -> tuple[str, ...]:
        return ("identity_at_init", "merges", "off_means_off")

    def rewrite(self, site: Site) -> None:
        if self.of_input(site.part):
            site.scale_input(site.parameter("ia3_input", (site.in_features,), ones))
        else:
            site.scale_output(site.parameter("ia3_output", (site.out_features,), ones))


def ones(vector: Tensor, generator: Generator) -> None:
    """No change."""
    vector.fill_(1)
