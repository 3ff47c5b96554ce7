"""Unstructured pruning: weights of least magnitude, or random ones, become zero and stay it (Han et al. 2015)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from surgery.lazy import functions, torch
from surgery.operations.base import Flag, Granularity, Operation, Phase, Ratio, Share, Start, Word, flag, kind, quantity

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from torch import Tensor

    from surgery.anatomy.parts import Kind, Part
    from surgery.graph.site import Site


@dataclass(frozen=True, kw_only=True)
class Prune(Operation):
    """Set a share of the weights to zero and keep the mask beside them.

    Exactly round(share * count) weights go, of each matrix or, with `global`, of all of them together; ties go by
    position. `2:4` keeps two of every four neighbours along the input. A larger share cuts all that a smaller one cuts.
    """

    verb: ClassVar[str] = "prune"
    phase: ClassVar[Phase] = "mask"
    acts_on: ClassVar[tuple[Kind, ...]] = ("projection",)
    granularity: ClassVar[Granularity] = "tensor"

    score: Word = kind("what is kept: the largest weights, or chance", choices=("magnitude", "random"))
    amount: Share | Ratio = quantity("share that goes, `50%`, or pattern that stays, `2:4`", at_least=0, at_most=1)
    global_: Flag = flag("rank the weights of all matrices together")

    def validate(self) -> Iterable[tuple[str, str, str]]:
        if isinstance(self.amount, Ratio) and self.global_:
            yield "global_", f"`global` and the pattern {self.amount} exclude each other", "leave one of them out"
        if isinstance(self.amount, Ratio) and not 0 < self.amount.part < self.amount.whole:
            yield "amount", f"{self.amount} keeps no share of its group", "write how many of how many stay: `2:4`"

    def fits(self, part: Part) -> str | None:
        if part.tied:
            return f"its weight is shared with {', '.join(part.tied)}, which would be pruned as well"
        if isinstance(self.amount, Ratio) and part.shape[1] % self.amount.whole:
            return f"its {part.shape[1]} inputs do not divide into groups of {self.amount.whole}"
        return None

    def promises(self) -> tuple[str, ...]:
        return ("exact_sparsity", "merges")

    @property
    def on_merge(self) -> str:
        return "the zeros stay"

    @property
    def starts_from(self) -> Start:
        return "chance" if self.score == "random" else "full weight"

    @property
    def changes_base(self) -> bool:
        return True

    @property
    def collective(self) -> bool:
        return self.global_

    def claims(self, name: str | None) -> tuple[str, ...]:
        return ("mask",)

    def rewrite(self, site: Site) -> None:
        # All ones until it is filled: the scores are taken of the weight as it is read, through this mask.
        count = -(-site.part.shape[0] * site.part.shape[1] // 8)
        bits = torch.full((count,), 255, dtype=torch.uint8, device=site.device)
        site.mask_weight(functions.masked, site.buffer("weight_mask", bits))

    def fill(self, sites: Sequence[Site], context: Any) -> None:
        scores = [site.rows_of(self._score(site)) for site in sites]
        if isinstance(self.amount, Ratio):
            kept = [pattern(score, self.amount) for score in scores]
        elif self.global_:
            flat = largest(torch.cat([score.flatten() for score in scores]), self.amount)
            kept = [part.view_as(s) for part, s in zip(flat.split([s.numel() for s in scores]), scores, strict=True)]
        else:
            kept = [largest(score, self.amount) for score in scores]
        for site, keep in zip(sites, kept, strict=True):
            mask = torch.ones(site.stored_shape, dtype=torch.bool, device=keep.device)
            site.set_rows(mask, keep)
            site.data("weight_mask").copy_(functions.pack_bits(mask))
            site.zero_out(mask)

    def _score(self, site: Site) -> Tensor:
        """(out, in), larger is better; float32, or float64 for float64 weights."""
        weight = site.evaluate(site.weight)
        wide = weight.to(torch.float32) if weight.dtype.itemsize < 4 else weight
        if self.score == "magnitude":
            return wide.abs()
        return torch.rand(wide.shape, generator=site.generator("score"), dtype=wide.dtype).to(wide.device)


def largest(score: Tensor, share: float) -> Tensor:
    """True for all but the round(share * count) smallest; of equal scores the ones that come first go."""
    flat = score.flatten()
    count = round(share * flat.numel())
    keep = torch.ones_like(flat, dtype=torch.bool)
    if count:
        threshold = flat.kthvalue(count).values
        keep = flat > threshold
        ties = (flat == threshold).nonzero().flatten()
        keep[ties[count - int((flat < threshold).sum()) :]] = True
    return keep.view_as(score)


def pattern(score: Tensor, ratio: Ratio) -> Tensor:
    """True for the `part` largest of every `whole` neighbours along the last dimension; later ones win ties."""
    groups = score.unflatten(-1, (-1, ratio.whole))
    order = groups.flip(-1).argsort(dim=-1, descending=True, stable=True)[..., : ratio.part]
    keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True)
    return keep.flip(-1).flatten(-2)
