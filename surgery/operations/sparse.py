"""Sparse training: a fixed mask, or one that moves to where weights matter (SET, Mocanu 2018; RigL, Evci 2020)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from surgery.errors import GraphError, PlanError
from surgery.lazy import torch
from surgery.operations.base import Count, Share, Start, Word, kind, option, quantity
from surgery.operations.prune import all_but
from surgery.operations.prune_gradual import wide
from surgery.operations.sparse_budget import erdos_renyi
from surgery.operations.subnetwork import DENSE, MASK, Scheduled, Subnetwork, fill_mask, put_mask

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from surgery.anatomy.parts import Part
    from surgery.graph.site import Site


@dataclass(frozen=True, kw_only=True)
class Sparse(Subnetwork, Scheduled):
    """Train a sparse subnetwork: weights at zero take no part, get no gradient, and no optimizer moves them.

    The mask is drawn when the program is applied; the weights that it keeps are trained, without a `train` statement.
    `static` leaves it as it is. `surgery.schedule(model, optimizer)` moves the others: every so many steps the smallest
    of the kept weights go, a share of them, and as many come back, at zero and without moments: with `set` at random
    (Mocanu et al. 2018), with `rigl` where the gradient is largest (Evci et al. 2020). How many each matrix keeps never
    changes. With `until` the share falls to zero there along a cosine. All matrices together keep the same number
    either way: `budget er` (Erdős-Rényi) gives each as many as it has inputs and outputs, at most all, times a number.
    """

    verb: ClassVar[str] = "sparse"

    method: Word = kind("what becomes of the mask", choices=("static", "set", "rigl"))
    amount: Share = quantity("share of the weights that is zero", at_least=0, below=1)
    swap: Share | None = option(
        "share of the kept weights that changes places; unsaid 30%", default=None, above=0, at_most=1
    )
    every: Count | None = option("how often; unsaid 100 steps", default=None, unit="steps", at_least=1)
    until: Share | Count | None = option(
        "share of the training, or step, from which on the mask stays; unsaid 75% of `rigl`, never of `set`",
        default=None,
        unit="steps",
        above=0,
    )
    budget: Word = option(
        "by which matrices share the zeros: Erdős-Rényi, or all alike", default="er", choices=("er", "uniform")
    )
    start: Word = option(
        "which weights the mask keeps first: any, or the largest", default="random", choices=("random", "magnitude")
    )

    zeros: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)

    @property
    def period(self) -> int:
        """Steps from one swap to the next."""
        return 100 if self.every is None else self.every

    @property
    def end(self) -> float | int | None:
        """Where the swaps end: a share of the training (float) or a step (int)."""
        return 0.75 if self.until is None and self.method == "rigl" else self.until

    def validate(self) -> Iterable[tuple[str, str, str]]:
        for name in ("swap", "every", "until"):
            if self.method == "static" and getattr(self, name) is not None:
                yield name, f"`static` never changes its mask, and `{name}` says how", "leave it out, or take `rigl`"
        if isinstance(self.end, int) and self.end <= self.period:
            said = f"the swaps end at step {self.end}, and the first is at step {self.period}"
            yield "until", said, "let `until` be later, or `every` more often"

    def sized(self, parts: Sequence[Part], parameters: int) -> Sparse:
        sizes = [(part.shape[0], part.shape[1]) for part in parts]
        if self.budget == "er":
            kept = erdos_renyi(sizes, self.amount)
        else:
            kept = [out * wide - round(self.amount * out * wide) for out, wide in sizes]
        for part, count in zip(parts, kept, strict=True):
            if not count:
                raise PlanError.of(
                    "S117",
                    f"`{self}` keeps no weight of {part.path}",
                    help="say a smaller share, or leave the place out",
                )
        zeros = {_key(part): out * wide - count for part, (out, wide), count in zip(parts, sizes, kept, strict=True)}
        return replace(self, zeros=zeros)

    def sizes(self) -> dict[str, Any]:
        return {"zeros": dict(self.zeros)}

    def resized(self, sizes: dict[str, Any]) -> Sparse:
        return replace(self, **sizes)

    def notes(self) -> Iterable[str]:
        yield f"{sum(self.zeros.values()):,} weights at zero"

    def zeros_of(self, part: Part) -> int:
        """How many weights of a place are zero, always."""
        return self.zeros[_key(part)]

    def zeroed(self, part: Part) -> int:
        return self.zeros_of(part)

    def untrained(self, part: Part) -> int:
        return self.zeros_of(part)

    @property
    def moving(self) -> tuple[str, ...]:
        return () if self.method == "static" else (MASK, DENSE)

    @property
    def starts_from(self) -> Start:
        return "chance" if self.start == "random" else "full weight"

    def rewrite(self, site: Site) -> None:
        put_mask(site, dense=self.asks_gradient)

    def fill(self, sites: Sequence[Site], context: Any) -> None:
        for site in sites:
            weight = site.evaluate(site.weight)
            if self.start == "magnitude":
                score = wide(weight).abs()
            else:
                score = torch.rand(weight.shape, generator=site.generator("mask")).to(weight.device)
            fill_mask(site, all_but(self.zeros_of(site.part), score))

    # ---- from step to step

    @property
    def asks_gradient(self) -> bool:
        return self.method == "rigl"

    def ending(self, steps: int | None) -> int | None:
        if self.method == "static" or self.end is None or isinstance(self.end, int):
            return self.end if isinstance(self.end, int) else None
        if steps is None:
            raise GraphError.of(
                "S373",
                f"`{self}` swaps weights until a share of the training is over, and nobody knows how long that is",
                help="say `surgery.schedule(model, optimizer, steps=10_000)`, or `until 7500 steps` in the program",
            )
        last = math.floor(self.end * steps)
        if last <= self.period:
            raise GraphError.of(
                "S373",
                f"of {steps} steps the swaps of `{self}` end at step {last}, and the first is at step {self.period}",
                help="train longer, or say `every` fewer steps",
            )
        return last

    def turns(self, step: int, length: int | None) -> bool:
        return self.method != "static" and step % self.period == 0 and (length is None or step < length)

    def share(self, step: int, length: int | None) -> float:
        """Of the kept weights, what a step swaps: alpha/2 (1 + cos(pi t / T))."""
        alpha = 0.3 if self.swap is None else self.swap
        return alpha if length is None else alpha / 2 * (1 + math.cos(math.pi * step / length))

    def masks(
        self,
        step: int,
        length: int | None,
        before: Sequence[Tensor],
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        generators: Sequence[Generator],
    ) -> list[Tensor]:
        after = []
        for index, (mask, weight) in enumerate(zip(before, weights, strict=True)):
            if self.method == "rigl":
                growth = wide(gradients[index]).abs()
            else:
                growth = torch.rand(mask.shape, generator=generators[index]).to(mask.device)
            after.append(swapped(mask, wide(weight).abs(), growth, self.share(step, length)))
        return after


def swapped(mask: Tensor, size: Tensor, growth: Tensor, share: float) -> Tensor:
    """The mask without the smallest of what it keeps, and with as many of the others whose growth is largest.

    All are (out, in), and size and growth not negative. What goes now does not come back at once. Ties go by position.
    """
    kept = int(mask.sum())
    count = min(round(share * kept), mask.numel() - kept)
    stays = all_but(mask.numel() - kept + count, size.masked_fill(~mask, -1))
    comes = all_but(mask.numel() - count, growth.masked_fill(mask, -1))
    return stays | comes


def _key(part: Part) -> str:
    return f"{part.path}.{part.parameter}"
