"""Lottery tickets: train, prune, rewind, and again (Frankle and Carbin 2019; rewinding to step k, Frankle 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from surgery.operations.base import Count, Flag, Share, flag, option, quantity
from surgery.operations.prune import Prune
from surgery.operations.prune_gradual import cut_further
from surgery.operations.subnetwork import MASK, STEP, Subnetwork, put_mask

if TYPE_CHECKING:
    from torch import Tensor

    from surgery.graph.site import Site


@dataclass(frozen=True, kw_only=True)
class Lottery(Subnetwork):
    """Find a lottery ticket: a sparse subnetwork that trains as well from early weights as the whole network does.

    `surgery.lottery(model, train)` trains, sets the smallest of the weights that are left to zero, puts all others back
    to what they were at the step of `rewind`, and does so as many times as there are rounds, the same share of what is
    left each time. Round r leaves (1 - share)^(r / rounds). The weights are trained, without a `train` statement; what
    else the program trains is put back with them. Until then the mask keeps everything.
    """

    verb: ClassVar[str] = "lottery"

    amount: Share = quantity("share of the weights that is zero in the end", above=0, below=1)
    rounds: Count = option("how often it is trained and pruned", at_least=1)
    rewind: Count = option("step whose weights are put back", default=0, unit="steps", at_least=0)
    global_: Flag = flag("rank the weights of all matrices together")

    @property
    def moving(self) -> tuple[str, ...]:
        return MASK, STEP

    def rewrite(self, site: Site) -> None:
        put_mask(site, step=True)

    def settled(self, step: int) -> Prune:
        """What a round has made of the network, as a statement: step 0 is before the first."""
        return Prune(score="magnitude", amount=1 - (1 - self.amount) ** (step / self.rounds), global_=self.global_)

    def masks(self, step: int, before: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        """The masks after a round, the first one being 1: (out, in), True where a weight is kept."""
        return cut_further(before, weights, self.settled(step).stays)
