"""Adapters: a narrow network h + s W_up f(W_down h) after a sub-layer (Houlsby et al. 2019), or beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from surgery.lazy import functional, functions, torch
from surgery.operations.base import (
    Count,
    Flag,
    Number,
    Operation,
    Phase,
    Selection,
    Share,
    Variant,
    Word,
    flag,
    kind,
    option,
    payload,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Generator, Tensor
    from torch.fx import Node

    from surgery.anatomy.parts import Kind, Part
    from surgery.graph.edge import EdgeSite

# Word -> function of torch.nn.functional and its options.
ACTIVATIONS: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "relu": ("relu", {}),
        "gelu": ("gelu", {}),
        "gelu_new": ("gelu", {"approximate": "tanh"}),
        "silu": ("silu", {}),
        "swish": ("silu", {}),
        "tanh": ("tanh", {}),
        "sigmoid": ("sigmoid", {}),
        "leaky_relu": ("leaky_relu", {}),
        "relu6": ("relu6", {}),
        "elu": ("elu", {}),
        "selu": ("selu", {}),
        "celu": ("celu", {}),
        "mish": ("mish", {}),
        "softplus": ("softplus", {}),
        "hardswish": ("hardswish", {}),
        "identity": ("", {}),
        "linear": ("", {}),
    }
)


@dataclass(frozen=True, kw_only=True)
class Adapter(Operation):
    """Adapters (Houlsby et al. 2019): h + s (W_up f(W_down h + b) + c) on the way of h into the residual stream.

    h is the output of a sub-layer: `after attn, ffn` is Houlsby's, `after ffn` Pfeiffer's (2021). `beside ffn` (He et
    al. 2022) reads what the sub-layer reads, and adds to its output. W_up, b and c start at zero: no change, to the
    bit. Of several on one sub-layer each has a name, and says which comes next: `adapter ... then task as language`.
    They are not linear, so a merge leaves them as they are.
    """

    verb: ClassVar[str] = "adapter"
    phase: ClassVar[Phase] = "attach"
    acts_on: ClassVar[tuple[Kind, ...]] = ("edge",)
    selecting: ClassVar[tuple[str, ...]] = ("after", "beside")

    activation: Word = kind("f, applied between the two maps", choices=tuple(ACTIVATIONS), default="relu")
    bottleneck: Count = option("width of the bottleneck", at_least=1)
    after: Selection | None = option("sub-layers whose output it reads and adds to", default=None)
    beside: Selection | None = option("sub-layers whose input it reads, adding to their output", default=None)
    scale: Number | Variant = option(
        "s, what the adapter's output is multiplied with; learned from a number on, or fixed",
        default=1.0,
        at_least=-1e6,
        at_most=1e6,
        choices={"learned": payload(Number, default=1.0, at_least=-1e6, at_most=1e6)},
    )
    dropout: Share = option("share of the bottleneck dropped in training", default=0.0, below=1)
    norm: Flag = flag("normalise what the adapter reads, with a layer norm of its own")
    then: Word | None = option("name of the adapter that comes next after the same sub-layer", default=None)

    def validate(self) -> Iterable[tuple[str, str, str]]:
        if self.after is not None and self.beside is not None:
            yield "beside", "an adapter stands `after` a sub-layer or `beside` it", "write two statements"
        if self.scale == 0 or (isinstance(self.scale, Variant) and self.scale.value == 0):
            yield "scale", "`scale 0` is no adapter at all", "leave `scale` out: it is 1"

    def fits(self, part: Part) -> str | None:
        if part.inlined:
            return f"its {part.role} is computed in the layer's own code, and no module gives its output"
        if self.beside is not None and part.input is None:
            return f"no module takes the input of its {part.role}"
        return None

    def promises(self) -> tuple[str, ...]:
        return ("identity_at_init", "off_means_off")

    @property
    def on_merge(self) -> str:
        return "stays, it is not linear" if ACTIVATIONS[self.activation][0] else "stays"

    def claims(self, name: str | None) -> tuple[str, ...]:
        # Adapters on one edge stand in a row. Each claims the place that it takes there, counted from the end.
        return (
            f"adapter {name or 'default'}",
            f"place before `{self.then}`" if self.then else "place, the last one there",
        )

    @property
    def follower(self) -> str | None:
        return self.then

    @property
    def beside_another(self) -> str:
        return "give both a name, and say in the first which comes next: `adapter ... then second as first`"

    def rewrite(self, site: EdgeSite) -> None:
        width, narrow = site.width, self.bottleneck
        x = site.output if self.beside is None else site.input
        if self.norm:
            weight, bias = (
                site.parameter("adapter_norm_weight", (width,), ones),
                site.parameter("adapter_norm_bias", (width,)),
            )
            x = site.call(functions.wide_norm, x, weight, bias)
        down = site.parameter("adapter_down_weight", (narrow, width), kaiming)
        x = site.call(functions.wide_linear, x, down, site.parameter("adapter_down_bias", (narrow,)))
        function, options = ACTIVATIONS[self.activation]
        if function:
            x = site.call(getattr(functional, function), x, **options)
        if self.dropout:
            x = site.module("adapter_dropout", torch.nn.Dropout(self.dropout))(x)
        up = site.parameter("adapter_up_weight", (width, narrow))
        x = site.call(functions.wide_linear, x, up, site.parameter("adapter_up_bias", (width,)))
        x = self._scaled(site, x)
        site.add_to_output(x if self.beside is None else site.call(functions.shaped_like, x, site.output), self.then)

    def _scaled(self, site: EdgeSite, x: Node) -> Node:
        if not isinstance(self.scale, Variant):
            return x if self.scale == 1 else site.call(torch.mul, x, self.scale)
        start = float(str(self.scale.value))

        def begin(tensor: Tensor, generator: Generator) -> None:
            tensor.fill_(start)

        return site.call(torch.mul, x, site.parameter("adapter_scale", (1,), begin))


def ones(tensor: Tensor, generator: Generator) -> None:
    """The scale of a norm, as norms start."""
    torch.nn.init.ones_(tensor)


def kaiming(tensor: Tensor, generator: Generator) -> None:
    """Uniform in +-1/sqrt(in), as torch's own linear maps start."""
    torch.nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
