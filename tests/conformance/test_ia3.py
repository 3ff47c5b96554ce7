"""The same vectors give PEFT's IA3 logits to 1e-6 of the largest in float32, and its merged weights."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from tests import studied, zoo
from tests.conformance.test_peft import distance

# What PEFT has to be told: names of the maps that make keys and values, and of the way down.
TARGETS: dict[str, tuple[list[str], list[str]]] = {
    "llama": (["k_proj", "v_proj"], ["down_proj"]),
    "qwen2": (["k_proj", "v_proj"], ["down_proj"]),
    "bert": (["key", "value"], ["output.dense"]),
    "t5": (["SelfAttention.k", "SelfAttention.v"], ["wo"]),
    "opt": (["k_proj", "v_proj"], ["fc2"]),
    "gpt2": (["attn.c_attn"], ["mlp.c_proj"]),
}
SLOWER = ("qwen2", "opt")
WRITTEN = {"gpt2": "ia3 on attn.q,k,v + ffn.down"}


def peft_ia3(family: str, model: nn.Module, seed: int = 0) -> tuple[Any, dict[str, Tensor]]:
    """IA3 by PEFT on a copy, every vector random, and the vectors by path."""
    from peft import IA3Config, inject_adapter_in_model

    outputs, inputs = TARGETS[family]
    down = [n for n, _ in model.named_modules() if n.endswith(tuple(inputs)) and "attention.output" not in n]
    others = [n for n, _ in model.named_modules() if n.endswith(tuple(outputs)) and ("mlp" not in n or n not in down)]
    configuration = IA3Config(
        target_modules=[*others, *down], feedforward_modules=down, fan_in_fan_out=family == "gpt2"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = inject_adapter_in_model(configuration, copy.deepcopy(model)).eval()
    vectors: dict[str, Tensor] = {}
    for path in [*others, *down]:
        held: Any = adapted.get_submodule(path).ia3_l["default"]
        with torch.no_grad():
            held.copy_(1 + 0.4 * torch.randn(held.shape, generator=zoo.seeded(seed, path)))
        vectors[path] = held.detach().flatten().clone()
    return adapted, vectors


@torch.no_grad()
def load_into(model: nn.Module, vectors: dict[str, Tensor]) -> None:
    """Fill ours; of GPT-2's fused map each role has a third."""
    filled = 0
    for name, parameter in surgery.parameters(model).items():
        path, _, local = name.rpartition(".")
        vector = vectors[path]
        if local[-2:] in ("_q", "_k", "_v"):
            vector = vector.chunk(3)["qkv".index(local[-1])]
        parameter.copy_(vector)
        filled += vector.numel()
    assert filled == sum(vector.numel() for vector in vectors.values())


@pytest.mark.parametrize("family", [pytest.param(f, marks=pytest.mark.slow if f in SLOWER else ()) for f in TARGETS])
def test_logits_and_merged_weights_equal_pefts(family: str) -> None:
    one = zoo.specimen(family)
    untouched = one.logits()
    peer, vectors = peft_ia3(family, one.model)
    wanted = zoo.logits(peer, one.inputs)
    studied.apply(WRITTEN.get(family, "ia3"), family, one.model)
    load_into(one.model, vectors)
    assert distance(one.logits(), wanted) <= 1e-6
    assert distance(untouched, wanted) > 0.01, "vectors without an effect prove nothing"
    surgery.merge(one.model)
    for path in vectors:
        theirs: Any = peer.get_submodule(path)
        theirs.merge()
        ours: Any = one.model.get_submodule(path)
        assert distance(ours.weight, theirs.base_layer.weight) <= 1e-6
        if ours.bias is not None:
            assert distance(ours.bias, theirs.base_layer.bias) <= 1e-6


def test_gradients_equal_pefts() -> None:
    one = zoo.specimen("bert", dtype=torch.float64)
    peer, vectors = peft_ia3("bert", one.model)
    peer.double()
    studied.apply("ia3", "bert", one.model)
    vectors = {path: vector.double() for path, vector in vectors.items()}
    load_into(one.model, vectors)
    for path, vector in vectors.items():
        held: Any = peer.get_submodule(path).ia3_l["default"]
        held.data.copy_(vector.view_as(held))
    for each in (peer, one.model):
        each(**one.inputs).logits.square().mean().backward()
    for name, parameter in surgery.parameters(one.model).items():
        layer: Any = peer.get_submodule(name.rpartition(".")[0])
        assert distance(parameter.grad, layer.ia3_l["default"].grad.flatten()) <= 1e-9, name
