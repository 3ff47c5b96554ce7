"""The same A and B give PEFT's logits: to 1e-6 of the largest in float32, to 1e-12 in float64 without casts."""

from __future__ import annotations

import copy

import pytest
import torch

import surgery
from tests import zoo
from tests.conformance.peers import linear_maps, load_into, peft_lora
from tests.reference_decoder import Shape, reference_decoder

SLOWER = ("qwen2", "gpt_neox", "bert", "opt", "phi3", "t5")
OPTIONS = {"plain": {}, "rs": {"rs": True}, "dora": {"dora": True}, "dora rs": {"dora": True, "rs": True}}
WRITTEN = {"plain": "", "rs": " scale rs", "dora": " dora", "dora rs": " dora scale rs"}


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference as a share of the largest value."""
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(
    "family", ["llama", "gemma", "gpt2", *(pytest.param(f, marks=pytest.mark.slow) for f in SLOWER)]
)
def test_float32_logits_equal_pefts(family: str, option: str) -> None:
    one = zoo.specimen(family)
    untouched = one.logits()
    peer = peft_lora(one.model, linear_maps(one.model), rank=3, alpha=5, **OPTIONS[option])
    wanted = zoo.logits(peer.model, one.inputs)
    program = surgery.parse(f"lora rank 3 alpha 5{WRITTEN[option]} on all linear")
    ours = surgery.apply(program, one.model)
    load_into(ours, peer.tensors)
    # Random llama and gemma amplify rounding: PEFT's own, against float64, is near or above 1e-6 there.
    rounding = distance(wanted, zoo.logits(copy.deepcopy(peer.model).double(), one.inputs))
    bound = max(1e-6, 4 * rounding) if family in ("llama", "gemma") else 1e-6
    assert distance(zoo.logits(ours, one.inputs), wanted) <= bound
    assert distance(untouched, wanted) > 0.01, "adapters without an effect prove nothing"


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_float64_logits_equal_pefts(family: str, option: str) -> None:
    """Sharper than transformers' own casts would allow: both sides round alike there."""
    one = zoo.specimen(family, dtype=torch.float64)
    peer = peft_lora(one.model, linear_maps(one.model), rank=3, alpha=5, **OPTIONS[option])
    wanted = zoo.logits(peer.model, one.inputs)
    ours = surgery.apply(surgery.parse(f"lora rank 3 alpha 5{WRITTEN[option]} on all linear"), one.model)
    load_into(ours, peer.tensors)
    assert distance(zoo.logits(ours, one.inputs), wanted) <= 1e-8


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("fused", [False, True])
def test_float64_logits_equal_pefts_on_the_reference_decoder(fused: bool, option: str) -> None:
    model = reference_decoder(Shape(fused=fused, bias=True, width=40, ffn=51))
    tokens = zoo.tokens(model.shape.vocabulary)
    untouched = zoo.logits(model, (tokens,))
    peer = peft_lora(model, linear_maps(model), rank=5, alpha=3, **OPTIONS[option])
    wanted = zoo.logits(peer.model, (tokens,))
    program = surgery.parse(f"lora rank 5 alpha 3{WRITTEN[option]} on all linear")
    ours = surgery.apply(program, copy.deepcopy(model), example_inputs=(tokens,))
    load_into(ours, peer.tensors)
    assert distance(zoo.logits(ours, (tokens,)), wanted) <= 1e-12
    assert distance(untouched, wanted) > 0.01


@pytest.mark.parametrize("option", OPTIONS)
def test_gradients_equal_pefts(option: str) -> None:
    model = reference_decoder(Shape(bias=True, width=40, ffn=51))
    tokens = zoo.tokens(model.shape.vocabulary)
    peer = peft_lora(model, linear_maps(model), rank=5, alpha=3, **OPTIONS[option])
    program = surgery.parse(f"lora rank 5 alpha 3{WRITTEN[option]} on all linear")
    ours = surgery.apply(program, copy.deepcopy(model), example_inputs=(tokens,))
    load_into(ours, peer.tensors)
    for each in (peer.model, ours):
        each(tokens).square().mean().backward()
    names = {"lora_A": "lora_A.default.weight", "lora_B": "lora_B.default.weight"}
    checked = 0
    for name, parameter in surgery.parameters(ours).items():
        path, _, kind = name.rpartition(".")
        if kind in names:
            wanted = peer.model.get_parameter(f"{path}.{names[kind]}").grad
            assert distance(parameter.grad, wanted) <= 1e-11, name
            checked += 1
    assert checked == 2 * len(linear_maps(model))
