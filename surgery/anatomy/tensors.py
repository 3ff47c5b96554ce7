"""An anatomy tensor by tensor: beside each part its bias, and every parameter that belongs to no part."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from surgery.anatomy.parts import Anatomy, Part
from surgery.anatomy.stacks import Lists
from surgery.graph.module import added_parameters

if TYPE_CHECKING:
    from torch import nn

HOLDERS = ("projection", "lookup", "norm", "experts")
NEW = "bias.new"
"""Role of a bias that a linear map does not have yet."""
OTHER = "other"
"""Role of a tensor that no part holds: selected by layer or path, not by meaning."""


def tensors(anatomy: Anatomy, model: nn.Module, new: bool = False) -> Anatomy:
    """The anatomy with parts of kind `bias` and `tensor`; a bias has the role of what it belongs to.

    new: also a place for a bias at every projection that has none. Of all tensors only the floating ones count, and not
    those that a program has added.
    """
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names[id(tensor)].append(name)
    ours = set(map(id, added_parameters(model).values()))
    held = {
        name: tensor
        for name, tensor in model.named_parameters(remove_duplicate=False)
        if tensor.is_floating_point() and id(tensor) not in ours
    }
    parts: list[Part] = []
    for part in anatomy.parts:
        parts.append(part)
        parts += _biases(part, new)
    known = {_name(part.path, part.parameter) for part in parts}
    lists, stacks = Lists(model), {stack.path: stack.name for stack in anatomy.stacks}
    for name, tensor in held.items():
        if name not in known:
            parts.append(_other(name, tuple(tensor.shape), lists, stacks))
    beside = {
        name: tuple(n.rpartition(".")[0] for n in group if n != name) for group in names.values() for name in group
    }
    parts = [
        replace(part, tied=beside.get(_name(part.path, part.parameter), ()))
        if part.kind in ("bias", "tensor")
        else part
        for part in parts
    ]
    return replace(anatomy, parts=tuple(dict.fromkeys(parts)))


def _biases(part: Part, new: bool) -> Iterator[Part]:
    if part.kind not in HOLDERS:
        return
    if part.bias is not None:
        yield replace(part, kind="bias", parameter=part.bias, bias=None, shape=part.shape[:1], transposed=False)
    elif new and part.kind == "projection" and part.role != "router":  # whose module chooses as well
        yield replace(part.whole(), kind="bias", role=NEW, tied=())


def _other(name: str, shape: tuple[int, ...], lists: Lists, stacks: dict[str, str]) -> Part:
    path, _, local = name.rpartition(".")
    place = lists.place(path)
    # Torch's own modules call it `bias`; what the study finds by dataflow is no part of this.
    bias = local == "bias" or local.endswith("_bias")
    part = Part(OTHER, "bias" if bias else "tensor", path, local, shape)
    if place is None or place.stack not in stacks:
        return part
    return replace(part, stack=stacks[place.stack], layer=place.layer)


def _name(path: str, parameter: str) -> str:
    return f"{path}.{parameter}" if path else parameter
