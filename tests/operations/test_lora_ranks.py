"""Ranks that differ between places: statements said twice, tables by layer, budgets."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.compiler.plan import Plan
from surgery.operations.lora_ranks import matrices, numbers
from tests import zoo
from tests.operations.test_lora import refused


def ranks(model: nn.Module) -> dict[str, int]:
    """Rank of every A by its name."""
    return {name: each.shape[-2] for name, each in surgery.parameters(model).items() if ".lora_A" in name}


def layer(name: str) -> int:
    found = re.search(r"\.(\d+)\.", name)
    assert found
    return int(found[1])


@torch.no_grad()
def randomised(model: Any) -> dict[str, Tensor]:
    added = surgery.parameters(model)
    for name, parameter in added.items():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=zoo.seeded(2, name)))
    return added


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_adapter_said_in_several_statements(family: str) -> None:
    """switch: unnamed statements at different places, fused or not, are one adapter, on and off together."""
    model = zoo.tiny(family)
    fed = zoo.inputs(model)
    base = zoo.logits(model, fed)
    program = "lora rank 2 on attn.q in layers 0..1\nlora rank 3 on attn.q in layers 2\nlora rank 4 alpha 9 on attn.v"
    surgery.apply(surgery.parse(f"{program}\nlora rank 1 on ffn.down as other"), model)
    found = {name: rank for name, rank in ranks(model).items() if "other" not in name}
    assert Counter(found.values()) == {2: 2, 3: 1, 4: 3}
    randomised(model)
    surgery.activate(model, "default")
    ours = zoo.logits(model, fed)
    surgery.activate(model, "other")
    others = zoo.logits(model, fed)
    assert not torch.equal(ours, base)
    assert not torch.equal(others, base)
    assert not torch.equal(others, ours)
    with torch.no_grad():
        for name, parameter in surgery.parameters(model).items():
            if "other" not in name:
                parameter.zero_()
    assert torch.equal(zoo.logits(model, fed), others), "some statement's adapter was left on"
    surgery.activate(model, "default")
    assert torch.equal(zoo.logits(model, fed), base)


def test_the_same_place_twice_is_a_conflict() -> None:
    error = refused("lora rank 2 on attn.q in layers 0..1\nlora rank 3 on attn.q in layers 1..2", zoo.tiny("llama"))
    assert {each.code for each in error.diagnostics} == {"S103"}
    assert "layers.1" in str(error)


TABLE = "let widths = 4,  1, 2\nlora rank widths alpha 8, 3, 4 scale rs on attn.q,v"


@pytest.mark.parametrize("family", ["qwen2", "phi3"])
def test_a_table_gives_every_layer_its_own(family: str) -> None:
    """formula: W + s B A with each layer's rank and alpha; statements for each layer mean the same, to the bit."""
    model = surgery.apply(surgery.parse(TABLE), zoo.tiny(family))
    assert {(layer(name), rank) for name, rank in ranks(model).items()} == {(0, 4), (1, 1), (2, 2)}
    apart = "\n".join(
        f"lora rank {rank} alpha {alpha} scale rs on attn.q,v in layers {number}"
        for number, (rank, alpha) in enumerate([(4, 8), (1, 3), (2, 4)])
    )
    other = surgery.apply(surgery.parse(apart), zoo.tiny(family))
    fed = zoo.inputs(model)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in other.state_dict().items())
    randomised(model)
    randomised(other)
    assert torch.equal(zoo.logits(model, fed), zoo.logits(other, fed))
    assert surgery.verify(model)


def test_a_table_is_kept_by_merging_saving_and_planning(tmp_path: Path) -> None:
    """round trip; counts in the plan are those of the model; the plan says the ranks."""
    model = zoo.tiny("gpt2")
    plan = surgery.plan(surgery.parse(TABLE), model)
    assert "rank 1 at 2 places, 2 at 2, 4 at 2" in str(plan)
    surgery.apply(plan, model)
    assert plan.cost.trainable == sum(each.numel() for each in randomised(model).values())
    assert str(Plan.from_json(plan.to_json())) == str(plan)
    surgery.save(model, tmp_path / "out")
    fed = zoo.inputs(model)
    assert torch.equal(zoo.logits(surgery.load(tmp_path / "out"), fed), zoo.logits(model, fed))
    wanted = zoo.logits(model, fed)
    merged = zoo.logits(surgery.merge(model), fed)
    assert (merged - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_a_table_that_does_not_match_is_refused() -> None:
    """Error: S119 with both numbers; a rank beyond its matrix is named as ever."""
    for program, said in {
        "lora rank 4, 2 on attn.q": "2 entries, and the statement acts on 3 layers",
        "lora rank 2 alpha 4, 2 on attn.q": "the table of alphas has 2 entries",
        "lora rank 4, 2, 1 on attn.q + embed": "embed_tokens is in no layer",
        "lora rank 4, 99, 1 on attn.q": "rank 99 on a 24 x 24 matrix",
    }.items():
        error = refused(program, zoo.tiny("llama"))
        assert {each.code for each in error.diagnostics} <= {"S119", "S101"}
        assert said in str(error), program
        assert all(each.span is not None for each in error.diagnostics)


def test_tables_are_written_and_read() -> None:
    said = surgery.parse("let a = 8,16\nlora rank a on attn.q", parameters={"a": "2, 3,4"})
    assert str(said) == "lora rank 2, 3, 4 on attn.q\n"
    assert surgery.parse(str(said)) == said
    for wrong in (
        "lora rank 4, on attn",
        "lora rank 4, q on attn",
        "lora rank 2, 0 on attn",
        "lora rank 2, 1.5 on attn",
    ):
        with pytest.raises(surgery.SurgeryError):
            surgery.parse(wrong)


BUDGETS = [("llama", "10%", ""), ("gpt2", "7.3%", ""), ("t5", "20%", ""), ("phi3", "9%", " dora"), ("qwen2", "99%", "")]


@pytest.mark.parametrize(("family", "budget", "more"), BUDGETS)
def test_a_budget_is_kept_and_used(family: str, budget: str, more: str) -> None:
    """budget: within it, as planned and as counted; another step would exceed it; ranks differ by one at most."""
    program = f"lora budget {budget}{more} on all linear"
    model = zoo.tiny(family)
    plan = surgery.plan(surgery.parse(program), model)
    (step,) = plan.steps
    surgery.apply(plan, model)
    trained = sum(each.numel() for each in surgery.parameters(model).values())
    total = sum(each.numel() for each in model.parameters())
    share = float(budget.rstrip("%")) / 100
    assert trained == plan.cost.trainable
    assert trained / total <= share
    found = {part: step.operation.at(part).rank for part in step.parts}
    full = {part: min(matrices(part)[1:]) for part in step.parts}
    free = {part: rank for part, rank in found.items() if rank < full[part]}
    if not free:
        assert set(found.values()) == set(full.values())
        return
    equal = min(free.values())
    assert max(found.values()) <= equal + 1
    assert all(rank == full[part] for part, rank in found.items() if rank < equal), "only its size holds a rank down"
    left = share * (total - trained) / (1 - share) - trained
    assert all(numbers(part, 1) > left for part, rank in free.items() if rank == equal), "one more would have fitted"
    first = [
        rank for part, rank in found.items() if part.role == step.parts[0].role and part.shape == step.parts[0].shape
    ]
    assert all(one >= other for one, other in pairwise(first)), "equal matrices are raised in the model's order"


def test_ranks_of_a_budget_survive_what_is_left_of_a_plan(tmp_path: Path) -> None:
    """round trip: the ranks are those that were planned, also where a merge has taken some of their places away."""
    program = surgery.parse("lora budget 8% on attn.q,v + ffn; prefix 2 on all layers")
    model = surgery.apply(program, zoo.tiny("llama"))
    randomised(model)
    fed = zoo.inputs(model)
    surgery.save(model, tmp_path / "out")
    loaded = surgery.load(tmp_path / "out")
    assert ranks(loaded) == ranks(model)
    assert torch.equal(zoo.logits(loaded, fed), zoo.logits(model, fed))


def test_a_budget_for_nothing_says_the_least_possible() -> None:
    """Error: S118 with a budget that is enough, and the next smaller one that could be written is not."""
    error = refused("lora budget 1% on all linear", zoo.tiny("llama"))
    (diagnostic,) = error.diagnostics
    assert diagnostic.code == "S118"
    found = re.search(r"least budget possible is ([\d.]+)%", diagnostic.help)
    assert found
    surgery.plan(surgery.parse(f"lora budget {found[1]}% on all linear"), zoo.tiny("llama"))
    refused(f"lora budget {float(found[1]) - 0.01:.2f}% on all linear", zoo.tiny("llama"))
    for wrong in ("lora rank 2 budget 1% on attn", "lora on attn", "lora budget 100% on attn", "lora budget 2 on attn"):
        with pytest.raises(surgery.SurgeryError):
            surgery.parse(wrong)
