"""What programs mean on a reference decoder, worked out by hand: no anatomy, no graphs, only the paper's formulas."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surgery.language.program import Program, Statement
from surgery.language.selector import Difference, Intersection, Layers, Role, Selector, Union
from surgery.operations.adapter import Adapter
from surgery.operations.base import Variant
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
            chosen = sorted(spots(statement.selector, shape))
            depth = sorted({layer for layer, _ in chosen})
            for spot in chosen:
                yield statement, _of(statement.operation, depth.index(spot[0])), spot


def _of(lora: Lora, index: int) -> Lora:
    """As it is in the layer of this number among those that it acts on."""
    tables = {name: value[index] for name in ("rank", "alpha") if isinstance(value := getattr(lora, name), tuple)}
    return replace(lora, **tables)


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


class Narrow(nn.Module):
    """A sub-layer and what is added to its output, in turn: each step gets the input and the output so far."""

    def __init__(self, inner: nn.Module, steps: list[Callable[[Tensor, Tensor], Tensor]]) -> None:
        super().__init__()
        self.inner, self.steps = inner, steps

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        y: Tensor = self.inner(x, *rest)
        for step in self.steps:
            y = y + step(x, y)
        return y


def narrowed(model: ReferenceDecoder, program: Program, tensors: dict[str, Tensor]) -> ReferenceDecoder:
    """A decoder whose sub-layers have the program's adapters around them, written out: s (W_up f(W_down h + b) + c)."""
    made = [each for each in program.statements if isinstance(each.operation, Adapter)]
    made.sort(key=lambda each: each.operation.follower is None)  # the one that says what comes next is first
    for layer, block in enumerate(model.layers):
        for name, spot in (("attention", "attn.o"), ("ffn", "ffn.down")):
            steps: list[Callable[[Tensor, Tensor], Tensor]] = []
            for statement in made:
                if (layer, spot) in spots(statement.selector, model.shape):
                    named = f"{statement.name}_" if statement.name else ""
                    start = f"layers.{layer}.{SUFFIX[spot]}.surgery_edge.{named}adapter_"
                    own = {key.removeprefix(start): t for key, t in tensors.items() if key.startswith(start)}
                    steps.append(partial(_narrow, statement.operation, own))
            setattr(block, name, Narrow(getattr(block, name), steps))
    return model


def _narrow(adapter: Any, w: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    h = y if adapter.beside is None else x
    if adapter.norm:
        centred = h - h.mean(-1, keepdim=True)
        h = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w["norm_weight"] + w["norm_bias"]
    h = h @ w["down_weight"].t() + w["down_bias"]
    word = {"gelu_new": "gelu", "swish": "silu"}.get(adapter.activation, adapter.activation)
    if word not in ("identity", "linear"):
        h = F.gelu(h, approximate="tanh") if adapter.activation == "gelu_new" else getattr(F, word)(h)
    scale = w["scale"] if isinstance(adapter.scale, Variant) else adapter.scale
    return scale * (h @ w["up_weight"].t() + w["up_bias"])


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


def made_prompt(held: Mapping[str, Tensor]) -> Tensor:
    """(n, width): what torch's own layers make of the tensors of p-tuning, by their names without `ptuning_`."""
    rows = held["embedding"]

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ held[f"{name}_weight"].T + held[f"{name}_bias"]

    if "third_weight" in held:
        return linear("third", linear("second", linear("first", rows).relu()).relu())
    hidden = held["lstm_weight_hh_l0"].shape[1]
    network = nn.LSTM(rows.shape[1], hidden, 2, bidirectional=True, batch_first=True, dtype=rows.dtype)
    network.load_state_dict({name[5:]: tensor for name, tensor in held.items() if name.startswith("lstm_")})
    return linear("second", linear("first", network(rows[None])[0][0]).relu())
