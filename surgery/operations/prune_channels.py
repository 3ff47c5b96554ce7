"""Channels of the residual stream are cut out: the whole model gets narrower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from surgery.errors import PlanError
from surgery.operations.structured import Structured

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from surgery.anatomy.groups import Group
    from surgery.anatomy.parts import Kind, Part
    from surgery.graph.cutting import Cut


@dataclass(frozen=True, kw_only=True)
class PruneChannels(Structured):
    """Make the residual stream narrower: `prune channels 10% by magnitude`.

    A channel is all that reads or writes it, in every layer at once: its column of the embeddings and of the tables of
    positions, its row of the output maps with their biases, its entries in norms, and its columns of what reads the
    stream, the head's too. Heads and feed-forward networks keep their widths. A norm divides by a mean over fewer
    channels: its gain is multiplied by sqrt(width / left) and its eps by width / left, so that behind an RMSNorm what
    is left computes what the whole does with those channels at zero. A LayerNorm subtracts another mean than before:
    there it computes what the whole does whose norms look at the channels that are left, and `verify` tells how far
    that is from the whole with the others at zero. `round to 64` leaves a multiple of 64.
    """

    verb: ClassVar[str] = "prune channels"
    acts_on: ClassVar[tuple[Kind, ...]] = ()
    unit: ClassVar[Literal["channels"]] = "channels"
    readers: ClassVar[tuple[str, ...]] = ()
    place: ClassVar[str] = "the residual stream"

    def grouped(self, parts: Sequence[Part], groups: Sequence[Group], refused: Mapping[str, str]) -> list[Group]:
        for place, reason in refused.items():
            raise PlanError.of(
                "S135",
                f"`{self.verb}` cannot cut what {place} reads: {reason}"
                if "output" not in place
                else f"`{self.verb}` cannot narrow {place}: {reason}",
                label="the stream is cut everywhere or nowhere",
                help="cut neurons or heads, which keep the stream's width",
            )
        if not groups:
            raise PlanError.of(
                "S135", "the model has no residual stream: nothing that layers read was written outside of them"
            )
        return list(groups)

    def numbers(self, cut: Cut) -> Iterable[tuple[float, float]]:
        yield cut.group.count, len(cut.kept)
        for norm in cut.group.norms:
            if norm.eps and norm.was:
                yield norm.was, norm.was * (cut.group.count / len(cut.kept))

    def notes(self) -> Iterable[str]:
        yield from super().notes()
        norms = {norm.path for cut in self.cuts for norm in cut.group.norms if not norm.exact}
        if norms:
            yield f"{len(norms)} norms take their mean of what is left, no gain makes up for it: verify tells the error"
