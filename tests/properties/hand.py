"""What programs mean on a reference decoder, worked out by hand: no anatomy, no graphs, only the paper's formulas."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from surgery.language.program import Program, Statement
from surgery.language.selector import Difference, Intersection, Layers, Role, Selector, Union
from surgery.operations.freeze import Freeze
from surgery.operations.ia3 import Ia3
from surgery.operations.lora import Lora
from surgery.operations.train import Train
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


@torch.no_grad()
def rescaled(model: ReferenceDecoder, program: Program, tensors: dict[str, Tensor]) -> ReferenceDecoder:
    """A plain decoder with IA3's factors in its weights and with the biases that `train bias add` gives it.

    The way down has its columns scaled, every other map its rows and its bias.
    """
    own = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name in own:  # trained itself
            own[name].copy_(tensor)
    for statement in program.statements:
        if isinstance(statement.operation, Ia3):
            for spot in spots(statement.selector, model.shape):
                path, rows, ending = place(spot, model.shape)
                module = model.get_submodule(path)
                if spot[1] == "ffn.down":
                    module.weight *= tensors[f"{path}.ia3_input"]
                    continue
                factors = tensors[f"{path}.ia3_output{ending}"]
                module.weight[rows] *= factors[:, None]
                if module.bias is not None:
                    module.bias[rows] *= factors
    for name, tensor in tensors.items():
        path, _, local = name.rpartition(".")
        if local == "added_bias":  # behind the factors, as what comes last
            module = model.get_submodule(path)
            assert module.bias is None
            module.bias = nn.Parameter(tensor.detach().clone())
    return model


ADDED = ("lora_A", "lora_B", "lora_magnitude", "lora_A_q", "lora_A_k", "lora_A_v", "lora_B_q", "lora_B_k", "lora_B_v",
         "lora_magnitude_q", "lora_magnitude_k", "lora_magnitude_v")  # fmt: skip


def trained(program: Program, model: ReferenceDecoder) -> set[str]:
    """Names of the base's own tensors that a program trains; a tied head goes by the embedding's name."""
    said: dict[type, set[str]] = {Train: set(), Freeze: set()}
    for statement in program.statements:
        if type(statement.operation) in said:
            said[type(statement.operation)] |= tensors_of(statement.selector, model)
    return said[Train] - said[Freeze]


def tensors_of(selector: Selector, model: ReferenceDecoder) -> set[str]:
    """Names of the tensors that a selector of `train` means: a role, perhaps in some layers."""
    if isinstance(selector, Intersection):
        assert isinstance(selector.scope, Layers)
        inside = tuple(f"layers.{index}." for index in layers(selector.scope, model.shape.layers))
        return {name for name in tensors_of(selector.whole, model) if name.startswith(inside)}
    assert isinstance(selector, Role)
    names = {name for name, _ in model.named_parameters()}
    if selector.name == "head" and model.shape.tied:
        return {"embed.weight"}
    means = {
        "bias": lambda name: name.endswith(".bias"),
        "norm": lambda name: "norm" in name,
        "embed": lambda name: name == "embed.weight",
        "head": lambda name: name == "head.weight",
        "attn": lambda name: ".attention." in name,
        "ffn": lambda name: ".ffn." in name,
        "layers": lambda name: name.startswith("layers."),
    }
    return {name for name in names if means[selector.name](name)}
