"""What a study finds: stacks of layers, and parts with a role. Plain data; knows no torch and no method."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Kind = Literal["projection", "lookup", "norm", "attention", "experts", "block", "edge", "bias", "tensor", "entry"]


@dataclass(frozen=True)
class Stack:
    """A repeated `ModuleList` of layers. `name` is `decoder`, `encoder`, or else `stack1`."""

    name: str
    path: str
    depth: int


@dataclass(frozen=True)
class Heads:
    """Geometry of one attention call: query heads, key-value heads, width of a key and of a value."""

    query: int
    key_value: int
    key_width: int
    value_width: int


@dataclass(frozen=True)
class Part:
    """One role at one place.

    path: the module that owns the parameter (projection, lookup, norm, experts), or that computes the
        attention call (attention), or that is the block (ffn, layer), or whose output is what a sub-layer adds to the
        residual stream (edge).
    shape: (out, in) of a projection whatever its storage; (vocabulary, width) of a lookup; (width,) of a norm.
    transposed: the weight is stored (in, out), as in GPT-2's Conv1D.
    channels: output channels of a fused projection that play this role, as (start, stop) runs; None is all of them.
    stack, layer: where it stands; None outside every stack.
    tied: paths of other modules that use the same weight tensor.
    given: of an attention in plain torch, the arguments that the model passes and that have a default.
    input: of an edge, the module that takes the sub-layer's input.
    inlined: of an edge, no module hands it out, and it is computed in the forward of the module at `path`.
    written: the model's own code writes into the tensor as it runs.
    rescales: of a layer, it does more to what it reads than add to it, as where a norm follows the addition.
    """

    role: str
    kind: Kind
    path: str
    parameter: str = "weight"
    shape: tuple[int, ...] = ()
    transposed: bool = False
    bias: str | None = None
    channels: tuple[tuple[int, int], ...] | None = None
    stack: str | None = None
    layer: int | None = None
    heads: Heads | None = None
    tied: tuple[str, ...] = ()
    given: tuple[str, ...] = ()
    input: str | None = None
    inlined: bool = False
    written: bool = False
    rescales: bool = False

    @property
    def apart(self) -> bool:
        """Whether what acts here leaves the tensors of the module at `path` alone."""
        return self.kind in ("attention", "edge", "entry")

    @property
    def place(self) -> str:
        """The path, in words where the place is the model itself."""
        return self.path or "the model"

    @property
    def name(self) -> str:
        """The last word of the role: `q` of `attn.q`."""
        return self.role.rpartition(".")[2]

    @property
    def width(self) -> int:
        """Number of output channels that play this role."""
        return self.shape[0] if self.channels is None else sum(stop - start for start, stop in self.channels)

    def whole(self) -> Part:
        """The same place without its role: every channel of the projection."""
        return replace(self, role="linear", channels=None)

    def to_json(self) -> dict[str, Any]:
        """Fields that are not at their default."""
        empty = (None, False, ())
        return {key: value for key, value in asdict(self).items() if not any(value is each for each in empty)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Part:
        fields = dict(data)
        for key in ("shape", "tied", "given"):
            if key in fields:
                fields[key] = tuple(fields[key])
        if "channels" in fields:
            fields["channels"] = tuple((start, stop) for start, stop in fields["channels"])
        if "heads" in fields:
            fields["heads"] = Heads(**fields["heads"])
        return cls(**fields)


@dataclass(frozen=True)
class Anatomy:
    """All stacks and parts of a model, in execution order."""

    model: str
    stacks: tuple[Stack, ...]
    parts: tuple[Part, ...]

    def __str__(self) -> str:
        from surgery.anatomy.show import show

        return show(self)
