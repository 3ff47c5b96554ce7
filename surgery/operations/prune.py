"""Unstructured pruning: weights that matter least become zero and stay it (Han et al. 2015)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from surgery.lazy import functions, lazy, torch
from surgery.operations.base import (
    Count,
    File,
    Flag,
    Granularity,
    Operation,
    Phase,
    Ratio,
    Share,
    Start,
    Word,
    flag,
    kind,
    option,
    quantity,
)
from surgery.operations.prune_scores import by_layer, reconstructed, sensitivity

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from torch import Tensor

    from surgery.anatomy.parts import Kind, Part
    from surgery.graph import calibration
    from surgery.graph.site import Site
else:
    calibration = lazy("surgery.graph.calibration")

CALIBRATED = ("sensitivity", "wanda", "sparsegpt")


@dataclass(frozen=True, kw_only=True)
class Prune(Operation):
    """Set a share of the weights to zero and keep the mask beside them.

    Exactly round(share * count) weights go, of each matrix, with `rows` of each of its rows, or with `global` of all of
    them together; ties go by position. `2:4` keeps two of every four neighbours along the input. A larger share cuts
    all that a smaller one cuts. `sensitivity` is the mean of |dL/dw w| over the texts (SNIP, Lee et al. 2019); `wanda`
    is |w| times the norm of its input, within each row (Sun et al. 2024); `sparsegpt` also changes what stays so that
    it makes up for what goes (Frantar and Alistarh 2023). The last two go from layer to layer.
    """

    verb: ClassVar[str] = "prune"
    phase: ClassVar[Phase] = "mask"
    acts_on: ClassVar[tuple[Kind, ...]] = ("projection",)
    granularity: ClassVar[Granularity] = "tensor"

    score: Word = kind(
        "what is kept: the largest weights, chance, or what matters on the texts of `using`",
        choices=("magnitude", "random", *CALIBRATED),
    )
    amount: Share | Ratio = quantity("share that goes, `50%`, or pattern that stays, `2:4`", at_least=0, at_most=1)
    global_: Flag = flag("rank the weights of all matrices together")
    rows: Flag = flag("rank the weights of each row by themselves, as `wanda` always does")
    using: File | None = option("text, or JSONL with `text` or `input_ids`, to calibrate on", default=None)
    samples: Count = option("sequences of it that are read", default=128, at_least=1)
    length: Count = option("tokens of each sequence, at most", default=512, at_least=2)

    def validate(self) -> Iterable[tuple[str, str, str]]:
        if isinstance(self.amount, Ratio) and self.global_:
            yield "global_", f"`global` and the pattern {self.amount} exclude each other", "leave one of them out"
        if self.rows and (self.global_ or isinstance(self.amount, Ratio) or self.score == "sparsegpt"):
            yield "rows", f"`rows` has no meaning in `{self}`", "leave it out"
        if self.global_ and self.score in ("wanda", "sparsegpt"):
            yield "global_", f"`{self.score}` does not compare weights of different matrices", "leave `global` out"
        if self.score in CALIBRATED and self.using is None:
            yield "score", f"`{self.score}` needs texts", 'name a file: `using "calibration.jsonl"`'
        if self.score not in CALIBRATED and self.using is not None:
            yield "using", f"`{self.score}` reads no texts", "leave `using` out"
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
        if self.score in CALIBRATED:
            return "model"
        return "chance" if self.score == "random" else "full weight"

    @property
    def by_row(self) -> bool:
        """Whether every row loses the same number of weights."""
        return (self.rows or self.score == "wanda") and not isinstance(self.amount, Ratio)

    @property
    def needs_text(self) -> bool:
        return self.using is not None and calibration.wants_text(self.using)

    @property
    def changes_base(self) -> bool:
        return True

    @property
    def collective(self) -> bool:
        return self.global_ or self.score in CALIBRATED

    @property
    def layerwise(self) -> bool:
        return self.score == "wanda"

    def claims(self, name: str | None) -> tuple[str, ...]:
        return ("mask",)

    def rewrite(self, site: Site) -> None:
        # All ones until it is filled: the scores are taken of the weight as it is read, through this mask.
        count = -(-site.part.shape[0] * site.part.shape[1] // 8)
        bits = torch.full((count,), 255, dtype=torch.uint8, device=site.device)
        site.mask_weight(functions.masked, site.buffer("weight_mask", bits))

    def fill(self, sites: Sequence[Site], context: Any) -> None:
        if self.score not in ("wanda", "sparsegpt"):
            for site, keep in zip(sites, self._stays(self._scores(sites, context)), strict=True):
                self._keep(site, keep)
            return
        treat = self._wanda if self.score == "wanda" else self._sparsegpt
        for site, keep, rows in by_layer(sites, context, self._sequences(context), treat, self.score == "sparsegpt"):
            if self.score == "sparsegpt":
                site.hold_rows(rows)
            self._keep(site, keep)

    def _keep(self, site: Site, keep: Tensor) -> None:
        """Of a site's rows only these entries."""
        mask = torch.ones(site.stored_shape, dtype=torch.bool, device=keep.device)
        site.set_rows(mask, keep)
        site.data("weight_mask").copy_(functions.pack_bits(mask))
        site.zero_out(site.data("weight_mask"))

    def _stays(self, scores: Sequence[Tensor]) -> list[Tensor]:
        """What stays of each matrix of scores: the largest."""
        if isinstance(self.amount, Ratio):
            return [pattern(score, self.amount) for score in scores]
        if self.global_:
            flat = largest(torch.cat([score.flatten() for score in scores]), self.amount)
            return [part.view_as(s) for part, s in zip(flat.split([s.numel() for s in scores]), scores, strict=True)]
        if self.by_row:
            return [torch.stack([largest(row, self.amount) for row in score]) for score in scores]
        return [largest(score, self.amount) for score in scores]

    def _wanda(self, rows: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
        (keep,) = self._stays([rows.abs() * moments.sqrt()])
        return keep, rows * keep

    def _sparsegpt(self, rows: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
        def keep_in(scores: Tensor, first: int, last: int) -> Tensor:
            if isinstance(self.amount, Ratio):
                return pattern(scores, self.amount)
            cut = round(self.amount * len(rows) * last) - round(self.amount * len(rows) * first)
            return all_but(cut, scores)

        return reconstructed(rows, hessian, keep_in, self.amount.whole if isinstance(self.amount, Ratio) else 0)

    def _sequences(self, context: Any) -> list[Tensor]:
        assert self.using is not None
        vocabulary = max(part.shape[0] for part in context.anatomy.parts if part.role == "embed")
        return calibration.batches(self.using, context.tokenizer, self.samples, self.length, vocabulary)

    def _scores(self, sites: Sequence[Site], context: Any) -> list[Tensor]:
        """(rows, in) of each site, larger is better; float32, or float64 for float64 weights."""
        if self.score == "sensitivity":
            found = sensitivity(sites, context.model, self._sequences(context))
            return [site.rows_of(score) for site, score in zip(sites, found, strict=True)]
        return [site.rows_of(self._score(site)) for site in sites]

    def _score(self, site: Site) -> Tensor:
        """(out, in), larger is better; float32, or float64 for float64 weights."""
        weight = site.evaluate(site.weight)
        wide = weight.to(torch.float32) if weight.dtype.itemsize < 4 else weight
        if self.score == "magnitude":
            return wide.abs()
        return torch.rand(wide.shape, generator=site.generator("score"), dtype=wide.dtype).to(wide.device)


def largest(score: Tensor, share: float) -> Tensor:
    """True for all but the round(share * count) smallest; of equal scores the ones that come first go."""
    return all_but(round(share * score.numel()), score)


def all_but(count: int, score: Tensor) -> Tensor:
    """True for all but so many of the smallest; of equal scores the ones that come first go."""
    flat = score.flatten()
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
