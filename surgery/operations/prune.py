"""Unstructured pruning: weights that matter least become zero and stay it (Han et al. 2015)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from surgery.language.values import percent
from surgery.lazy import lazy, torch
from surgery.operations import texts
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
from surgery.operations.prune_global import kept_of_all, widest
from surgery.operations.prune_gradual import cubic, cut_further
from surgery.operations.prune_scores import by_layer, read_texts, reconstructed, sensitivity, weight_of
from surgery.operations.subnetwork import MASK, STEP, Scheduled, fill_mask, put_mask
from surgery.operations.train import whole_only

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import Any

    from torch import Generator, Tensor

    from surgery.anatomy.parts import Kind, Part
    from surgery.graph import calibration
    from surgery.graph.site import Site
else:
    calibration = lazy("surgery.graph.calibration")

CALIBRATED = ("sensitivity", "wanda", "sparsegpt")


@dataclass(frozen=True, kw_only=True)
class Prune(Operation, Scheduled):
    """Set a share of the weights to zero and keep the mask beside them.

    Exactly round(share * count) weights go, of each matrix, with `rows` of each of its rows, or with `global` of all of
    them together; ties go by position. `2:4` keeps two of every four neighbours along the input. A larger share cuts
    all that a smaller one cuts. `sensitivity` is the mean of |dL/dw w| over the texts (SNIP, Lee et al. 2019); `wanda`
    is |w| times the norm of its input, within each row (Sun et al. 2024); `sparsegpt` also changes what stays so that
    it makes up for what goes (Frantar and Alistarh 2023). The last two go from layer to layer.

    `magnitude 0% to 80% over 2000 steps` is gradual (Zhu and Gupta 2017): the weights are trained, without a `train`
    statement, and `surgery.schedule(model, optimizer)` cuts more of them every so many steps, along a cubic:
    s_f + (s_i - s_f) (1 - t/T)^3.
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
    samples: Count = texts.samples()
    length: Count = texts.length()
    to: Share | None = option("share that has gone in the end, where it grows while the model is trained", default=None)
    over: Count | None = option("steps until then", default=None, unit="steps", at_least=1)
    every: Count | None = option("how often more goes; unsaid 100 steps", default=None, unit="steps", at_least=1)

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

        yield from self._gradual_faults()

    def _gradual_faults(self) -> Iterable[tuple[str, str, str]]:
        if self.to is None:
            for name in ("over", "every"):
                if getattr(self, name) is not None:
                    yield name, f"`{name}` says how a share grows, and nothing says how far", "add `to 80%`"
            return
        if self.score != "magnitude" or isinstance(self.amount, Ratio):
            yield "to", f"`to` has no meaning in `{self}`", "a share of the smallest grows: `magnitude 0% to 80%`"
        elif self.to <= self.amount:
            yield "to", f"a share that grows cannot end at {percent(self.to)}", "let `to` be the larger share"
        if self.over is None:
            yield "to", "nothing says over how many steps the share grows", "add `over 2000 steps`"
        elif self.over < self.period:
            said = f"all is over at step {self.over}, and the first cut is at step {self.period}"
            yield "over", said, "let `over` be longer, or `every` more often"

    def fits(self, part: Part) -> str | None:
        if part.tied:
            return f"its weight is shared with {', '.join(part.tied)}, which would be pruned as well"
        if self.to is not None and whole_only(part):
            return whole_only(part)
        if isinstance(self.amount, Ratio) and part.shape[1] % self.amount.whole:
            return f"its {part.shape[1]} inputs do not divide into groups of {self.amount.whole}"
        return None

    def zeroed(self, part: Part) -> int | None:
        rows, columns = part.width, part.shape[1]
        if isinstance(self.amount, Ratio):
            return rows * columns // self.amount.whole * (self.amount.whole - self.amount.part)
        if self.global_:
            return None
        return rows * round(self.amount * columns) if self.by_row else round(self.amount * rows * columns)

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
    def period(self) -> int:
        """Steps from one cut to the next, of a share that grows."""
        return 100 if self.every is None else self.every

    def trains(self, part: Part) -> bool:
        return self.to is not None

    @property
    def moving(self) -> tuple[str, ...]:
        return (MASK, STEP) if self.to is not None else ()

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
        return self.score == "wanda" or (self.global_ and self.score not in CALIBRATED)

    def claims(self, name: str | None) -> tuple[str, ...]:
        return ("mask",)

    def rewrite(self, site: Site) -> None:
        put_mask(site, step=self.to is not None)  # all ones: the scores are taken of the weight as it is read

    def fill(self, sites: Sequence[Site], context: Any) -> None:
        if self.score not in ("wanda", "sparsegpt"):
            for site, keep in zip(sites, self._kept(sites, context), strict=True):
                fill_mask(site, keep)
            return
        treat = self._wanda if self.score == "wanda" else self._sparsegpt
        texts = read_texts(self, context.anatomy, context.tokenizer)
        for site, keep, rows in by_layer(sites, context, texts, treat, self.score == "sparsegpt"):
            if self.score == "sparsegpt":
                site.hold_rows(rows)
            fill_mask(site, keep)

    def stays(self, scores: Sequence[Tensor]) -> list[Tensor]:
        """What stays of each matrix of scores: the largest."""
        if isinstance(self.amount, Ratio):
            return [pattern(score, self.amount) for score in scores]
        if self.global_:
            return list(kept_of_all(lambda: scores, self.amount, widest(score.dtype for score in scores)))
        if self.by_row:
            return [torch.stack([largest(row, self.amount) for row in score]) for score in scores]
        return [largest(score, self.amount) for score in scores]

    # ---- from step to step, of a share that grows

    @property
    def scheduled(self) -> bool:
        return self.to is not None

    def ending(self, steps: int | None) -> int | None:
        return self.over

    def turns(self, step: int, length: int | None) -> bool:
        return length is not None and (step == length or (step < length and step % self.period == 0))

    def share_at(self, step: int) -> float:
        """The share that is zero once a step has been made."""
        assert self.to is not None, "asked of a share that grows"
        assert self.over is not None, "see `validate`"
        assert not isinstance(self.amount, Ratio), "see `validate`"
        return cubic(self.amount, self.to, min(1.0, step / self.over))

    def masks(
        self,
        step: int,
        length: int | None,
        before: Sequence[Tensor],
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        generators: Sequence[Generator],
    ) -> list[Tensor]:
        return cut_further(before, weights, self.settled(step).stays)

    def settled(self, step: int) -> Prune:
        """The statement with the share that is zero once a step has been made, as one that does not grow."""
        return self if self.to is None else replace(self, amount=self.share_at(step), to=None, over=None, every=None)

    def _wanda(self, rows: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
        (keep,) = self.stays([rows.abs() * moments.sqrt()])
        return keep, rows * keep

    def _sparsegpt(self, rows: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
        def keep_in(scores: Tensor, first: int, last: int) -> Tensor:
            if isinstance(self.amount, Ratio):
                return pattern(scores, self.amount)
            cut = round(self.amount * len(rows) * last) - round(self.amount * len(rows) * first)
            return all_but(cut, scores)

        return reconstructed(rows, hessian, keep_in, self.amount.whole if isinstance(self.amount, Ratio) else 0)

    def _kept(self, sites: Sequence[Site], context: Any) -> Iterable[Tensor]:
        """What stays of each site's rows, by scores (rows, in); float32, or float64 for float64 weights."""
        if self.score == "sensitivity":
            found = sensitivity(sites, context.model, read_texts(self, context.anatomy, context.tokenizer))
            return self.stays([site.rows_of(score) for site, score in zip(sites, found, strict=True)])
        if not self.global_:
            return self.stays([site.rows_of(self._score(site)) for site in sites])
        assert not isinstance(self.amount, Ratio), "see `validate`"

        def scores() -> Iterator[Tensor]:
            for site in sites:
                with calibration.at_hand(context.model, site.path):
                    yield site.rows_of(self._score(site))

        return kept_of_all(scores, self.amount, widest(site.evaluate(site.weight).dtype for site in sites))

    def _score(self, site: Site) -> Tensor:
        """(out, in), larger is better; float32, or float64 for float64 weights."""
        weight = weight_of(site)
        if self.score == "magnitude":
            return weight.abs()
        return torch.rand(weight.shape, generator=site.generator("score"), dtype=weight.dtype).to(weight.device)


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
