"""Low-rank adaptation: y = W x + s B A x, with W frozen (Hu et al. 2021), and its weight-decomposed form, DoRA."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from surgery.errors import GraphError
from surgery.lazy import functional, functions, torch
from surgery.operations.base import (
    Count,
    Counts,
    Flag,
    Number,
    Numbers,
    Operation,
    Phase,
    Share,
    Start,
    Variant,
    Word,
    flag,
    option,
    payload,
    same_as,
)
from surgery.operations.lora_init import RANDOM, loftq, normal, pissa
from surgery.operations.lora_ranks import by_layer, matrices, told, within
from surgery.operations.lora_ranks import key as place

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

    from torch import Generator, Tensor
    from torch.fx import Node

    from surgery.anatomy.parts import Kind, Part
    from surgery.graph.site import Site


@dataclass(frozen=True, kw_only=True)
class Lora(Operation):
    """Low-rank adaptation (Hu et al. 2021): y = W x + s B A x, with B = 0 at the start.

    s is alpha/rank, or alpha/sqrt(rank) with `scale rs` (Kalajdzievski 2023). On a fused projection each role gets an
    adapter of its own on its own channels; of an embedding, A is the table that starts at zero. Every expert of a stack
    gets an A and a B of its own, and its weight is W + s B A when it is read.
    """

    verb: ClassVar[str] = "lora"
    phase: ClassVar[Phase] = "attach"
    acts_on: ClassVar[tuple[Kind, ...]] = ("projection", "lookup", "experts")
    one_of: ClassVar[tuple[str, ...]] = ("rank", "budget")

    rank: Count | Counts | None = option(
        "width of the bottleneck; a table has one for each layer", default=None, at_least=1
    )
    budget: Share | None = option(
        "instead of `rank`: share of all parameters that may be trained. The largest equal rank that it pays for, then "
        "one more wherever that still fits, in the model's order",
        default=None,
        above=0,
        below=1,
    )
    alpha: Number | Numbers | None = option("numerator of the scale", default=same_as("rank"), above=0, at_most=1e6)
    dropout: Share = option("share of the adapter's input dropped in training", default=0.0, below=1)
    init: Word | Variant = option(
        "what A starts as. `pissa`: A and B from the weight's largest singular values, the base keeps the rest; "
        "`loftq`: codes, and the A and B that make up best for what they lose, in so many turns",
        default="kaiming",
        choices={**dict.fromkeys((*RANDOM, "pissa")), "loftq": payload(Count, default=5, at_least=1)},
    )
    scale: Word = option("alpha/rank, or `rs`: alpha/sqrt(rank)", default="alpha", choices=("alpha", "rs"))
    dora: Flag = flag("learn each output's norm apart from its direction (Liu et al. 2024)")

    ranks: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)
    alphas: Mapping[str, float] = field(default_factory=dict, compare=False, repr=False)

    @property
    def start(self) -> str:
        """The word of `init`."""
        return self.init.word if isinstance(self.init, Variant) else self.init

    @property
    def from_weight(self) -> bool:
        """Whether the adapter starts from the weight, which changes for it."""
        return self.start not in RANDOM

    @property
    def factor(self) -> float:
        """s: what the low-rank product is multiplied with."""
        assert isinstance(self.alpha, float | int), "of one part, see `at`"
        return self.alpha / (math.sqrt(self.r) if self.scale == "rs" else self.r)

    @property
    def r(self) -> int:
        """The rank."""
        assert isinstance(self.rank, int), "of one part, see `at`"
        return self.rank

    def validate(self) -> Iterable[tuple[str, str, str]]:
        if (self.rank is None) == (self.budget is None):
            yield "budget", "the ranks come from `rank` or from `budget`", "take one of them"
        if isinstance(self.rank, tuple) and isinstance(self.alpha, tuple) and len(self.rank) != len(self.alpha):
            yield "alpha", f"{len(self.rank)} ranks and {len(self.alpha)} alphas", "write one of each for every layer"
        if self.dora and self.from_weight:
            yield "dora", f"`dora` and `init {self.start}` both redefine the weight", "take one of them"

    def sized(self, parts: Sequence[Part], parameters: int) -> Lora:
        ranks = within(self.budget, parts, parameters, self.dora) if self.budget is not None else {}
        if isinstance(self.rank, tuple):
            ranks = by_layer(self.rank, parts, "rank")
        alphas = by_layer(self.alpha, parts, "alpha") if isinstance(self.alpha, tuple) else {}
        return replace(self, ranks=ranks, alphas=alphas)

    def sizes(self) -> dict[str, Any]:
        return {name: dict(said) for name, said in (("ranks", self.ranks), ("alphas", self.alphas)) if said}

    def resized(self, sizes: dict[str, Any]) -> Lora:
        return replace(self, **sizes)

    def at(self, part: Part) -> Lora:
        if not self.ranks and not self.alphas:
            return self
        rank, alpha = self.ranks.get(place(part), self.rank), self.alphas.get(place(part), self.alpha)
        one = replace(self, rank=rank, alpha=alpha, budget=None, ranks={}, alphas={})
        return one if alpha is not None else replace(one, alpha=float(one.r))

    def notes(self) -> Iterable[str]:
        if self.ranks:
            yield told(self.ranks)

    def fits(self, part: Part) -> str | None:
        _, out, wide = matrices(part)
        if self.r > min(out, wide):
            return f"rank {self.r} on a {out} x {wide} matrix, whose rank is at most {min(out, wide)}"
        if part.kind == "experts" and (self.dora or self.from_weight or self.dropout):
            said = "dora" if self.dora else "dropout" if self.dropout else f"init {self.start}"
            return f"{said} is not possible on experts, whose stacked weights are adapted and not their inputs"
        if part.kind == "lookup" and (self.dora or self.from_weight):
            return f"{'dora' if self.dora else f'init {self.start}'} needs a linear map, not a lookup"
        if part.tied and self.from_weight:
            return f"init {self.start} changes its weight, which is shared with {', '.join(part.tied)}"
        return None

    def warnings(self, parts: Sequence[Part], anatomy: Any, model: Any) -> Iterable[str]:
        if self.start == "pissa":
            yield f"switched off, `{self}` leaves the base without its largest singular values"
        if self.start == "loftq":
            yield f"switched off, `{self}` leaves codes that are not those of the weight"

    def promises(self) -> tuple[str, ...]:
        if self.from_weight:
            return ("merges",)  # what the base was is only known to rounding once it has changed
        return ("identity_at_init", "merges", "off_means_off")

    @property
    def starts_from(self) -> Start:
        return "full weight" if self.from_weight else "weight" if self.dora else "chance"

    @property
    def changes_base(self) -> bool:
        return self.from_weight

    def claims(self, name: str | None) -> tuple[str, ...]:
        # PiSSA and LoftQ change the base's weight, whose zeros a mask holds fast, and whose norms DoRA starts from.
        base = ("mask", "norms") if self.from_weight else ("norms",) if self.dora else ()
        return (f"adapter {name or 'default'}", *base)

    def rewrite(self, site: Site) -> None:
        lora = self.at(site.part)
        if site.part.kind == "experts":
            lora._rewrite_experts(site)
        elif site.is_lookup:
            lora._rewrite_lookup(site)
        else:
            lora._rewrite_projection(site)

    def _rewrite_projection(self, site: Site) -> None:
        if self.from_weight:
            self._check_base(site)
        a = site.parameter("lora_A", (self.r, site.in_features), RANDOM.get(self.start, zeros))
        b = site.parameter("lora_B", (site.out_features, self.r))
        x = site.input
        if self.dropout:
            x = site.module("lora_dropout", torch.nn.Dropout(self.dropout))(x)
        update = site.call(functions.low_rank, x, a, b, self.factor)
        site.add_to_output(self._decompose(site, a, b, update) if self.dora else update)

    def _rewrite_experts(self, site: Any) -> None:
        """One A and B for each expert."""
        count, out, wide = matrices(site.part)
        a = site.parameter("lora_A", (count, self.r, wide), RANDOM[self.start])
        b = site.parameter("lora_B", (count, out, self.r))
        site.add_to_weight(a, b, self.factor)

    def _rewrite_lookup(self, site: Site) -> None:
        """A's columns are looked up, so A is what must start at zero for one row to be trained at a time."""
        a = site.parameter("lora_A", (self.r, site.in_features))
        b = site.parameter("lora_B", (site.out_features, self.r), normal)
        row = site.call(functional.embedding, site.input, site.call(torch.t, a), site.padding)
        site.add_to_output(site.call(torch.mul, site.call(functional.linear, row, b), self.factor))

    def _decompose(self, site: Site, a: Node, b: Node, update: Node) -> Node:
        """m / |W + sBA| (W + sBA) x, as what it adds to W x; the norm is a constant to the gradient."""
        weight = site.own_rows(site.weight)
        m = site.parameter("lora_magnitude", (site.out_features,), ones)
        ratio = site.call(magnitude_ratio, m, weight, a, b, self.factor)
        return site.call(decomposed, site.base_without_bias(), update, ratio)

    def fill(self, sites: Sequence[Site], context: Any) -> None:
        for site in sites:
            if self.dora:
                m = site.data("lora_magnitude")
                m.data.copy_(torch.linalg.vector_norm(site.evaluate(site.own_rows(site.weight)).to(m.dtype), dim=1))
            if self.from_weight:
                a, b = self.at(site.part)._from_weight(site)
                site.data("lora_A").data.copy_(a)
                site.data("lora_B").data.copy_(b)

    def _from_weight(self, site: Site) -> tuple[Tensor, Tensor]:
        if isinstance(self.init, Variant):
            return loftq(site, self.r, self.factor, int(str(self.init.value)))
        return pissa(site, self.r, self.factor)

    def _check_base(self, site: Site) -> None:
        if not site.can_hold:
            raise GraphError.of(
                "S304",
                f"`init {self.start}` takes its start from the stored weight, and {site.path} computes with another",
                help="choose another `init`",
            )
        if self.start == "loftq" and not site.quantized:
            raise GraphError.of(
                "S380",
                f"`init loftq` makes up for what codes lose, and {site.path} is not quantized",
                help="add `quantize base nf4` to the program, or take `init pissa`",
            )


def magnitude_ratio(m: Tensor, weight: Tensor, a: Tensor, b: Tensor, factor: float) -> Tensor:
    """m / |W + sBA|, row by row: (out,), in m's dtype."""
    with torch.no_grad():
        norm = torch.linalg.vector_norm(weight.to(m.dtype) + factor * (b @ a), dim=1)
        norm = torch.where(norm == 0, 1, norm)  # a row that pruning has emptied has no direction, and stays zero
    return m / norm


def decomposed(base: Any, update: Any, ratio: Tensor) -> Any:
    """(ratio - 1) W x + ratio s B A x: what DoRA adds to W x."""
    return base * (ratio - 1) + update * ratio


def ones(m: Tensor, generator: Generator) -> None:
    """A place for the norms, which are filled in from the weight."""
    torch.nn.init.ones_(m)


def zeros(a: Tensor, generator: Generator) -> None:
    """A place for what is taken out of the weight."""
    torch.nn.init.zeros_(a)
