"""What programs mean on a reference decoder, worked out by hand: no anatomy, no graphs, only the paper's formulas."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from surgery.language.program import Program, Statement
from surgery.language.selector import Difference, Intersection, Layers, Role, Selector, Union
from surgery.operations.lora import Lora
from tests.reference_decoder import ReferenceDecoder, Shape

SUFFIX = {
    "attn.q": "attention.q",
    "attn.k": "attention.k",
    "attn.v": "attention.v",
    "attn.o": "attention.o",
    "ffn.up": "ffn.up",
    "ffn.gate": "ffn.gate",
    "ffn.down": "ffn.down",
}
Spot = tuple[int, str]  # layer, role


def spots(selector: Selector, shape: Shape) -> set[Spot]:
    """The projections that a selector means."""
    every = {(layer, role) for layer in range(shape.layers) for role in SUFFIX if role != "ffn.gate" or shape.gated}
    if isinstance(selector, Role):
        if selector.name in ("base", "linear", "layers"):
            return every
        return {spot for spot in every if spot[1] == selector.name or spot[1].startswith(selector.name + ".")}
    if isinstance(selector, Layers):
        return {spot for spot in every if spot[0] in layers(selector, shape.layers)}
    if isinstance(selector, Union):
        return set().union(*(spots(item, shape) for item in selector.items))
    if isinstance(selector, Intersection):
        return spots(selector.whole, shape) & spots(selector.scope, shape)
    assert isinstance(selector, Difference)
    return spots(selector.whole, shape) - spots(selector.cut, shape)


def layers(selector: Layers, depth: int) -> range:
    """Layer numbers, both ends included; negative ones count from the end."""
    if selector.parity is not None:
        return range(0 if selector.parity == "even" else 1, depth, 2)
    if selector.first is None:
        return range(depth)
    first = selector.first % depth
    last = first if selector.last is None else selector.last % depth
    return range(first, last + 1)


def place(spot: Spot, shape: Shape) -> tuple[str, slice, str]:
    """Path of the module that holds a projection, its rows there, and the ending of its tensors' names."""
    layer, role = spot
    path = f"layers.{layer}.{SUFFIX[role]}"
    if not (shape.fused and role in ("attn.q", "attn.k", "attn.v")):
        return path, slice(None), ""
    name = role[-1]
    key_value = shape.key_value_heads * shape.head_width
    start = {"q": 0, "k": shape.width, "v": shape.width + key_value}[name]
    return (
        f"layers.{layer}.attention.qkv",
        slice(start, start + (shape.width if name == "q" else key_value)),
        f"_{name}",
    )


def loras(program: Program, shape: Shape) -> Iterator[tuple[Statement, Lora, Spot]]:
    """Every adapter of a program with its place."""
    for statement in program.statements:
        if isinstance(statement.operation, Lora):
            for spot in sorted(spots(statement.selector, shape)):
                yield statement, statement.operation, spot


@torch.no_grad()
def adapted(model: ReferenceDecoder, program: Program, tensors: dict[str, Tensor]) -> ReferenceDecoder:
    """A plain decoder with the adapters' effect in its weights: W + s B A, and DoRA's rows scaled to m."""
    for statement, lora, spot in loras(program, model.shape):
        path, rows, ending = place(spot, model.shape)
        before = f"{path}.{statement.name}_" if statement.name else f"{path}."
        a, b = tensors[f"{before}lora_A{ending}"], tensors[f"{before}lora_B{ending}"]
        factor = lora.alpha / (math.sqrt(lora.rank) if lora.scale == "rs" else lora.rank)
        module = model.get_submodule(path)
        weight = module.weight[rows] + factor * b @ a
        if lora.dora:
            magnitude = tensors[f"{before}lora_magnitude{ending}"]
            weight = weight * (magnitude / weight.norm(dim=1))[:, None]
        module.weight[rows] = weight
    return model
