"""Experts' stacked weights: every expert has an A and a B of its own, however the model multiplies."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import surgery
from surgery.graph.stack import CHILD
from tests import zoo
from tests.operations.test_lora import refused

WAYS = ["grouped_mm", "batched_mm", "eager"]


@torch.no_grad()
def randomise(model: Any, size: float = 0.3) -> dict[str, Tensor]:
    """Trained tensors at random, on a scale that matters next to the base."""
    added = surgery.parameters(model)
    for name, parameter in added.items():
        parameter.copy_(size * torch.randn(parameter.shape, generator=zoo.seeded(3, name), dtype=torch.float64))
    return added


def experts(model: Any) -> list[tuple[str, Any]]:
    return [(path, each) for path, each in model.named_modules() if path.endswith("mlp.experts")]


@pytest.mark.parametrize("family", zoo.EXPERTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_starts_as_nothing_and_switches_off(family: str, dtype: torch.dtype) -> None:
    """identity_at_init, off_means_off, frame: to the bit, in train and eval mode; the base keeps its names and bits."""
    model = zoo.tiny(family, dtype=dtype)
    fed = zoo.inputs(model)
    before, base = {name: t.clone() for name, t in model.state_dict().items()}, zoo.logits(model, fed)
    surgery.apply(surgery.parse("lora rank 2 alpha 5 on experts"), model)
    assert torch.equal(zoo.logits(model, fed), base)
    assert torch.equal(zoo.logits(model.train(), fed), base)
    model.eval()
    added = randomise(model)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert len(added) == 4 * len(experts(model))
    assert all(parameter.dtype == torch.float32 for parameter in added.values())
    on = zoo.logits(model, fed)
    assert (on - base).abs().max() > 0.01 * base.abs().max()
    with surgery.disabled(model):
        assert torch.equal(zoo.logits(model, fed), base)
    assert torch.equal(zoo.logits(model, fed), on)
    assert {name for name, each in model.named_parameters() if each.requires_grad} == set(added)


@torch.no_grad()
def by_hand(model: Any, added: dict[str, Tensor], factor: float) -> None:
    """W + s B A written into the stored weights, expert by expert."""
    for path, module in experts(model):
        for name in ("gate_up_proj", "down_proj"):
            a, b = (added[f"{path}.{CHILD}.lora_{letter}_{name}"] for letter in "AB")
            for index, weight in enumerate(module._parameters[name]):
                delta = factor * b[index] @ a[index]
                weight += delta if weight.shape == delta.shape else delta.t()


@pytest.mark.parametrize("family", zoo.EXPERTS)
def test_the_formula_is_each_experts_own(family: str) -> None:
    """formula: the model whose weights were computed by hand, where they lie (out, in) and (in, out)."""
    model, plain = zoo.tiny(family, dtype=torch.float64), zoo.tiny(family, dtype=torch.float64)
    for each in (model, plain):
        each.set_experts_implementation("batched_mm")  # torch's grouped products have no float64
    fed = zoo.inputs(model)
    surgery.apply(surgery.parse("lora rank 3 alpha 5 scale rs on experts"), model)
    by_hand(plain, randomise(model), 5 / 3**0.5)
    wanted = zoo.logits(plain, fed)
    assert (zoo.logits(model, fed) - wanted).abs().max() <= 1e-9 * wanted.abs().max()


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_multiplying_reads_the_same(way: str) -> None:
    """formula, gradients: grouped products, batched ones, and one expert after the other."""
    program = "lora rank 2 on experts"
    one, other = zoo.tiny("mixtral"), zoo.tiny("mixtral")
    other.set_experts_implementation(way)
    fed = zoo.inputs(one)
    gradients = []
    for model in (one, other):
        surgery.apply(surgery.parse(program), model)
        randomise(model)
        model(**fed).logits.square().mean().backward()
        gradients.append({name: each.grad for name, each in surgery.parameters(model).items()})
    wanted = zoo.logits(one, fed)
    assert (zoo.logits(other, fed) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    largest = max(float(each.abs().max()) for each in gradients[0].values())
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0
        assert (gradient - gradients[1][name]).abs().max() <= 1e-4 * largest, name


@pytest.mark.parametrize("family", zoo.EXPERTS)
def test_a_merge_is_exact_and_leaves_nothing(family: str) -> None:
    """merges: stored is what was read, to the bit; classes and names are the base's again."""
    model = zoo.tiny(family, dtype=torch.bfloat16)
    fed, names = zoo.inputs(model), list(model.state_dict())
    classes = [type(each) for _, each in experts(model)]
    stored = [each.down_proj.clone() for _, each in experts(model)]
    surgery.apply(surgery.parse("lora rank 2 on experts; lora rank 1 on experts as other"), model)
    randomise(model)
    wanted = zoo.logits(model, fed)
    surgery.merge(model)
    assert torch.equal(zoo.logits(model, fed), wanted)
    assert list(model.state_dict()) == names
    assert [type(each) for _, each in experts(model)] == classes
    assert all(isinstance(each.down_proj, nn.Parameter) for _, each in experts(model))
    assert not any(torch.equal(each.down_proj, old) for (_, each), old in zip(experts(model), stored, strict=True))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_channels_of_a_fused_stack(family: str) -> None:
    """frame: `ffn.up` changes its rows of every expert, which lie apart or in turns with the gate's, and no others."""
    model = zoo.tiny(family)
    stored = {path: each.gate_up_proj.clone() for path, each in experts(model)}
    plan = surgery.plan(surgery.parse("lora rank 2 on ffn.up"), model)
    surgery.apply(plan, model)
    randomise(model)
    surgery.merge(model)
    assert plan.steps[0].parts
    for part in plan.steps[0].parts:
        if part.kind != "experts":
            continue
        rows = torch.zeros(part.shape[1], dtype=torch.bool)
        for start, stop in part.channels or ():
            rows[start:stop] = True
        assert 0 < rows.sum() < part.shape[1]
        moved = (model.get_submodule(part.path).gate_up_proj != stored[part.path]).transpose(
            1, 2 if part.transposed else 1
        )
        assert moved[:, rows].float().mean() > 0.99
        assert not moved[:, ~rows].any()


def test_it_is_saved_loaded_copied_and_verified(tmp_path: Path) -> None:
    """round trip, copies, verify: also where the model multiplies in another way than by default."""
    program = "lora rank 2 on all linear; lora rank 1 on experts as second; prefix 2 on all layers"
    for way in ("grouped_mm", "batched_mm"):
        model = zoo.tiny("mixtral")
        model.set_experts_implementation(way)
        fed = zoo.inputs(model)
        surgery.apply(surgery.parse(program), model)
        randomise(model)
        wanted = zoo.logits(model, fed)
        assert torch.equal(zoo.logits(copy.deepcopy(model), fed), wanted)
        surgery.save(model, tmp_path / way)
        assert torch.equal(zoo.logits(surgery.load(tmp_path / way), fed), wanted)
        report = surgery.verify(model)
        assert report, str(report)
        surgery.activate(model, "second")
        assert not torch.equal(zoo.logits(model, fed), wanted)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    found = []
    for checkpointing in (False, True):
        model = surgery.apply(surgery.parse("lora rank 2 on experts"), zoo.tiny("mixtral")).train()
        randomise(model)
        if checkpointing:
            for layer in model.model.layers:
                layer.gradient_checkpointing = True
                layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        model(**zoo.inputs(model), use_cache=False).logits.square().mean().backward()
        found.append([each.grad for each in surgery.parameters(model).values()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.slow
def test_it_compiles_whole() -> None:
    """compile: no break in the graph, where the class of the experts is one of ours."""
    model = surgery.apply(surgery.parse("lora rank 2 on experts"), zoo.tiny("mixtral"))
    randomise(model)
    fed = zoo.inputs(model)
    wanted = zoo.logits(model, fed)
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(**fed, use_cache=False).logits
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_what_experts_cannot_have_is_refused() -> None:
    """Error: what needs their inputs, or a weight to start from; a rank beyond an expert's; other verbs."""
    for program, said in {
        "lora rank 2 dropout 10% on experts": "dropout is not possible on experts",
        "lora rank 2 dora on all linear": "dora is not possible on experts",
        "lora rank 2 init pissa on experts": "init pissa is not possible on experts",
        "lora rank 25 on experts": "rank 25 on a 80 x 24 matrix, whose rank is at most 24",
        "quantize experts nf4": "no projection",
        "lora rank 2 on experts; lora rank 2 on ffn.up": "both act on",
    }.items():
        assert said in str(refused(program, zoo.tiny("mixtral"))), program


def test_a_budget_counts_every_expert() -> None:
    model = zoo.tiny("mixtral")
    plan = surgery.plan(surgery.parse("lora budget 12% on all linear"), model)
    surgery.apply(plan, model)
    trained = sum(each.numel() for each in surgery.parameters(model).values())
    assert plan.cost.trainable == trained
    assert 0.1 < trained / sum(each.numel() for each in model.parameters()) <= 0.12


def test_some_adapters_are_merged_and_the_others_stay(tmp_path: Path) -> None:
    """merges: what is left is the other adapter alone, on and off as before, and is saved and verified."""
    program = surgery.parse("lora rank 2 on experts as one; lora rank 3 on ffn.down as other")
    model, apart = (surgery.apply(program, zoo.tiny("mixtral")) for _ in range(2))
    fed = zoo.inputs(model)
    randomise(model)
    randomise(apart)
    wanted = zoo.logits(model, fed)
    surgery.activate(apart, "one")
    without = zoo.logits(apart, fed)
    surgery.merge(model, only=["one"])
    assert torch.equal(zoo.logits(model, fed), wanted)
    assert all(".other_lora_" in name for name in surgery.parameters(model))
    with surgery.disabled(model):
        assert torch.equal(zoo.logits(model, fed), without)
    assert not torch.equal(without, wanted)
    surgery.save(model, tmp_path / "out")
    assert torch.equal(zoo.logits(surgery.load(tmp_path / "out"), fed), wanted)
    report = surgery.verify(model)
    assert report, str(report)
