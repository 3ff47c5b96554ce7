"""Low-rank adaptation: y = W x + s B A x, with W frozen (Hu et al. 2021), and its weight-decomposed form, DoRA."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from surgery.errors import GraphError
from surgery.lazy import functional, functions, torch
from surgery.operations.base import (
    Count,
    Flag,
    Number,
    Operation,
    Phase,
    Share,
    Word,
    flag,
    option,
    same_as,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from torch import Generator, Tensor
    from torch.fx import Node

    from surgery.anatomy.parts import Kind, Part
    from surgery.graph.site import Site


@dataclass(frozen=True, kw_only=True)
class Lora(Operation):
    """Low-rank adaptation (Hu et al. 2021): y = W x + s B A x, with B = 0 at the start.

    s is alpha/rank, or alpha/sqrt(rank) with `scale rs` (Kalajdzievski 2023). On a fused projection each role gets an
    adapter of its own on its own channels; of an embedding, A is the table that starts at zero.
    """

    verb: ClassVar[str] = "lora"
    phase: ClassVar[Phase] = "attach"
    acts_on: ClassVar[tuple[Kind, ...]] = ("projection", "lookup")

    rank: Count = option("width of the bottleneck", at_least=1)
    alpha: Number = option("numerator of the scale", default=same_as("rank"), above=0)
    dropout: Share = option("share of the adapter's input dropped in training", default=0.0, below=1)
    init: Word = option(
        "what A starts as; pissa takes A and B from the weight's largest singular values",
        default="kaiming",
        choices=("kaiming", "normal", "xavier", "orthogonal", "pissa"),
    )
    scale: Word = option("alpha/rank, or `rs`: alpha/sqrt(rank)", default="alpha", choices=("alpha", "rs"))
    dora: Flag = flag("learn each output's norm apart from its direction (Liu et al. 2024)")

    @property
    def factor(self) -> float:
        """s: what the low-rank product is multiplied with."""
        return self.alpha / (math.sqrt(self.rank) if self.scale == "rs" else self.rank)

    def validate(self) -> Iterable[tuple[str, str, str]]:
        if self.dora and self.init == "pissa":
            yield "dora", "`dora` and `init pissa` both redefine the weight", "take one of them"

    def fits(self, part: Part) -> str | None:
        narrow = min(part.width, part.shape[1])
        if self.rank > narrow:
            return f"rank {self.rank} on a {part.width} x {part.shape[1]} matrix, whose rank is at most {narrow}"
        if part.kind == "lookup" and (self.dora or self.init == "pissa"):
            return f"{'dora' if self.dora else 'init pissa'} needs a linear map, not a lookup"
        if part.tied and self.init == "pissa":
            return f"init pissa changes its weight, which is shared with {', '.join(part.tied)}"
        return None

    def warnings(self, parts: Sequence[Part], anatomy: Any, model: Any) -> Iterable[str]:
        if self.init == "pissa":
            yield f"switched off, `{self}` leaves the base without its largest singular values"

    def promises(self) -> tuple[str, ...]:
        if self.init == "pissa":
            return ("merges",)  # what the base was is only known to rounding once it has changed
        return ("identity_at_init", "merges", "off_means_off")

    def claims(self, name: str | None) -> tuple[str, ...]:
        # PiSSA changes the base's weight, which masks and codes hold fast, and whose norms DoRA starts from.
        base = ("mask", "codes", "norms") if self.init == "pissa" else ("norms",) if self.dora else ()
        return (f"adapter {name or 'default'}", *base)

    def rewrite(self, site: Site) -> None:
        if site.is_lookup:
            self._rewrite_lookup(site)
            return
        if self.init == "pissa" and not site.weight_is_stored:
            raise GraphError.of(
                "S304",
                f"`init pissa` takes its start from the stored weight, and {site.path} computes with another",
                help="choose another `init`",
            )
        a = site.parameter("lora_A", (self.rank, site.in_features), INITS[self.init])
        b = site.parameter("lora_B", (site.out_features, self.rank))
        x = site.input
        if self.dropout:
            x = site.module("lora_dropout", torch.nn.Dropout(self.dropout))(x)
        update = site.call(functions.low_rank, x, a, b, self.factor)
        site.add_to_output(self._decompose(site, a, b, update) if self.dora else update)

    def _rewrite_lookup(self, site: Site) -> None:
        """A's columns are looked up, so A is what must start at zero for one row to be trained at a time."""
        a = site.parameter("lora_A", (self.rank, site.in_features))
        b = site.parameter("lora_B", (site.out_features, self.rank), normal)
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
            if self.init == "pissa":
                self._principal(site)

    def _principal(self, site: Site) -> None:
        """A and B from the top singular triplets; the weight becomes what they leave over (PiSSA, Meng et al. 2024)."""
        rows = site.own_rows(site.weight)
        weight = site.evaluate(rows)
        u, sigma, v = torch.linalg.svd(
            weight.to(torch.float32 if weight.dtype.itemsize < 4 else weight.dtype), full_matrices=False
        )
        root = (sigma[: self.rank] / self.factor).sqrt()
        site.data("lora_A").data.copy_(root.unsqueeze(1) * v[: self.rank])
        site.data("lora_B").data.copy_(u[:, : self.rank] * root)
        site.subtract_from_weight((u[:, : self.rank] * sigma[: self.rank]) @ v[: self.rank])


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


def kaiming(a: Tensor, generator: Generator) -> None:
    """Uniform in +-1/sqrt(in), as Microsoft's loralib: Kaiming with a = sqrt(5)."""
    torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)


def normal(a: Tensor, generator: Generator) -> None:
    """Standard deviation one over the rank."""
    torch.nn.init.normal_(a, std=1 / min(a.shape), generator=generator)


def xavier(a: Tensor, generator: Generator) -> None:
    """Uniform with the variance 2 / (in + rank)."""
    torch.nn.init.xavier_uniform_(a, generator=generator)


def orthogonal(a: Tensor, generator: Generator) -> None:
    """Orthonormal rows."""
    torch.nn.init.orthogonal_(a, generator=generator)


INITS = {"kaiming": kaiming, "normal": normal, "xavier": xavier, "orthogonal": orthogonal, "pissa": kaiming}
