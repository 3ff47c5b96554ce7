"""P-tuning: a prompt made by a network (v1, Liu et al. 2021), or a prefix in every layer (v2, Liu et al. 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from surgery.lazy import functional, lazy, torch
from surgery.operations.base import Count, Variant, Word, kind, option, payload, quantity
from surgery.operations.front import Front

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from torch import Generator, Tensor
    from torch.fx import Node

    from surgery.anatomy.parts import Anatomy, Part
    from surgery.graph import recurrent
    from surgery.graph.soft_entry import EntrySite
    from surgery.operations.prefix import Prefix
else:
    recurrent = lazy("surgery.graph.recurrent")


@dataclass(frozen=True, kw_only=True)
class Ptuning(Front):
    """P-tuning v1 (Liu et al. 2021): P = f(E), n embeddings E, f three linear maps with relu between, or an LSTM.

    `via lstm`: two layers in both directions, then two linear maps with relu between. A merge keeps P and drops f.
    P-tuning v2 (Liu et al. 2022) is a prefix in every layer: `ptuning v2 20` does what `prefix 20` does.
    """

    verb: ClassVar[str] = "ptuning"

    version: Word = kind("v1: in front of the first layer; v2: keys and values in every layer", choices=("v1", "v2"))
    positions: Count = quantity("positions in front of the tokens", at_least=1)
    via: Variant | None = option(
        "v1: the network that makes the prompt, with its width; without it the embeddings are the prompt",
        default=None,
        choices={"mlp": payload(Count, default=128, at_least=1), "lstm": payload(Count, default=128, at_least=1)},
    )

    @property
    def length(self) -> int:
        return self.positions

    @property
    def hidden(self) -> int:
        """Width of the network."""
        return int(str(self.via.value)) if self.via is not None else 0

    @property
    def prefix(self) -> Prefix:
        """What v2 is."""
        from surgery.operations.prefix import Prefix

        return Prefix(positions=self.positions)

    def validate(self) -> Iterable[tuple[str, str, str]]:
        if self.version == "v2" and self.via is not None:
            through = self.via.value if self.via.word == "mlp" else 512
            other = f"`prefix {self.positions} via mlp {through}`"
            yield "via", "`v2` trains keys and values themselves", f"leave `via` out, or write {other}"

    def promises(self) -> tuple[str, ...]:
        return ("off_means_off",)

    @property
    def on_merge(self) -> str:
        return "becomes plain vectors" if self.via is not None else "stays"

    def folded(self) -> Ptuning:
        return replace(self, via=None)

    def narrowed(self, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        if self.version == "v1":
            return super().narrowed(parts)
        return tuple(part for part in parts if part.kind == "attention")

    def fits(self, part: Part) -> str | None:
        return super().fits(part) if self.version == "v1" else self.prefix.fits(part)

    def claims(self, name: str | None) -> tuple[str, ...]:
        return super().claims(name) if self.version == "v1" else self.prefix.claims(name)

    def warnings(self, parts: Sequence[Part], anatomy: Anatomy, model: Any) -> Iterable[str]:
        if self.version == "v1":
            return super().warnings(parts, anatomy, model)
        return self.prefix.warnings(parts, anatomy, model)

    def rewrite(self, site: Any) -> None:
        if self.version == "v1":
            super().rewrite(site)
        else:
            self.prefix.rewrite(site)

    def rows(self, site: EntrySite) -> Node:
        width = site.width
        if self.via is None:
            return site.parameter("ptuning", (self.positions, width), standard)
        inputs = site.parameter("ptuning_embedding", (self.positions, width), standard)
        made = self._mlp(site, inputs) if self.via.word == "mlp" else self._lstm(site, inputs)
        return site.folds_to("ptuning", made)

    def _linear(self, site: EntrySite, name: str, x: Node, inside: int, outside: int) -> Node:
        weight = site.parameter(f"ptuning_{name}_weight", (outside, inside), kaiming)
        bias = site.parameter(f"ptuning_{name}_bias", (outside,), uniform(inside))
        return site.call(functional.linear, x, weight, bias)

    def _mlp(self, site: EntrySite, x: Node) -> Node:
        """W3 relu(W2 relu(W1 E + b1) + b2) + b3"""
        x = site.call(torch.relu, self._linear(site, "first", x, site.width, self.hidden))
        x = site.call(torch.relu, self._linear(site, "second", x, self.hidden, self.hidden))
        return self._linear(site, "third", x, self.hidden, site.width)

    def _lstm(self, site: EntrySite, x: Node) -> Node:
        """W2 relu(W1 LSTM(E) + b1) + b2, the LSTM of two layers in both directions."""
        h = self.hidden
        weights = []
        for layer in (0, 1):
            for turned in ("", "_reverse"):
                inside = site.width if layer == 0 else 2 * h
                for name, shape in (("weight_ih", (4 * h, inside)), ("weight_hh", (4 * h, h))):
                    weights.append(site.parameter(f"ptuning_lstm_{name}_l{layer}{turned}", shape, uniform(h)))
                for name in ("bias_ih", "bias_hh"):
                    weights.append(site.parameter(f"ptuning_lstm_{name}_l{layer}{turned}", (4 * h,), uniform(h)))
        x = site.call(recurrent.lstm, x, h, *weights)
        x = site.call(torch.relu, self._linear(site, "first", x, 2 * h, 2 * h))
        return self._linear(site, "second", x, 2 * h, site.width)


def standard(tensor: Tensor, generator: Generator) -> None:
    """Standard deviation 1, as torch's own embeddings start."""
    torch.nn.init.normal_(tensor, generator=generator)


def kaiming(tensor: Tensor, generator: Generator) -> None:
    """Uniform in +-1/sqrt(in), as torch's own linear maps start."""
    torch.nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)


def uniform(width: int) -> Any:
    """Uniform in +-1/sqrt(width), as torch's own LSTMs and biases start."""

    def fill(tensor: Tensor, generator: Generator) -> None:
        tensor.uniform_(-(width**-0.5), width**-0.5, generator=generator)

    return fill
