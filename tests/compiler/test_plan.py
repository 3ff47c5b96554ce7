"""Plans: what they say, in which order, what they refuse."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

import surgery
from surgery.compiler.plan import Plan
from surgery.errors import PlanError, SurgeryError
from tests import zoo

EXAMPLE = (
    "quantize base nf4 double",
    "lora rank 2 on attn.q,v",
    "prefix 3 on all layers",
    "prune magnitude 50% on ffn",
)


def test_the_order_of_statements_means_nothing() -> None:
    """order: every permutation gives the same plan and the same bits, tensor by tensor."""
    first: dict[str, torch.Tensor] = {}
    plans = set()
    for order in itertools.permutations(EXAMPLE):
        model = zoo.tiny("llama")
        plan = surgery.plan(surgery.parse("\n".join(order)), model)
        written = plan.to_json()
        del written["program"]
        surgery.apply(plan, model)
        plans.add(json.dumps(written))
        bits = model.state_dict()
        first = first or bits
        assert list(bits) == list(first)
        for name, tensor in bits.items():
            assert tensor.dtype == first[name].dtype, name
            assert torch.equal(tensor, first[name]), (name, order)
    assert len(plans) == 1
    assert len(first) > 50


def test_a_plan_counts_what_apply_makes() -> None:
    """Planning: parameters and bytes in the plan are those of the transformed model."""
    model = zoo.tiny("gpt2")
    plan = surgery.plan(surgery.parse("\n".join(EXAMPLE)), model)
    surgery.apply(plan, model)
    assert sum(p.numel() for p in surgery.parameters(model).values()) == plan.cost.trainable > 0
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(surgery.parameters(model))
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    assert sum(t.numel() * t.element_size() for t in tensors) == plan.cost.bytes_after < plan.cost.bytes_before


def test_planning_reads_shapes_only() -> None:
    """Planning: a model on the meta device has the same plan, and planning leaves a live one as it was."""
    program = surgery.parse("\n".join(EXAMPLE))
    model = zoo.tiny("llama")
    before = {name: (tensor.data_ptr(), tensor._version) for name, tensor in model.named_parameters()}
    live = surgery.plan(program, model)
    assert {name: (tensor.data_ptr(), tensor._version) for name, tensor in model.named_parameters()} == before
    assert live.to_json() == surgery.plan(program, zoo.tiny("llama").to("meta")).to_json()
    assert len(live.steps) == 4


def test_a_plan_survives_json() -> None:
    """round_trip: a plan that was written down performs the same."""
    plan = surgery.plan(surgery.parse("\n".join(EXAMPLE)), zoo.tiny("phi3"))
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again.to_json() == plan.to_json()
    assert [step.parts for step in again.steps] == [step.parts for step in plan.steps]
    assert any(part.layer == 0 for step in again.steps for part in step.parts)


def test_the_text_tells_everything() -> None:
    """Planning: every statement, role, layer range, the totals and the warnings are in the text."""
    text = str(
        surgery.plan(surgery.parse("prune magnitude 50% on ffn\nlora rank 2 on ffn in layers 1..2"), zoo.tiny("llama"))
    )
    for said in (
        "prune magnitude 50% on ffn",
        "ffn.down",
        "layers 0..2",
        "layers 1..2",
        "Trainable",
        "Memory",
        "dense",
    ):
        assert said in text


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        ("lora rank 100000 on attn.q", "S101", "rank 100000"),
        ("lora rank 2 on attn.q expect 2", "S102", "finds 3"),
        ("lora rank 2 on attn.q\nlora rank 3 on attn", "S103", "both act on"),
        ("quantize base nf4\nquantize ffn fp4", "S103", "both act on"),
        ("prune magnitude 50% on ffn\nprune random 20% on ffn.up", "S103", "both act on"),
        ("prune magnitude 50% on ffn\nlora rank 2 init pissa on ffn", "S103", "both act on"),
        ("prefix 2 on all layers\nprefix 3 on all layers", "S103", "both act on"),
        ("prune magnitude 2:4 on ffn.down", "S101", "groups of 4"),
        ('prefix 3 init text "a b c" on all layers', "S104", "tokenizer"),
        ("lora rank 2 on cross.q", "S203", "cross"),
        ("lora rank 2 on attn.q in layers 7", "S205", "3"),
    ],
)
def test_what_does_not_fit_is_refused(program: str, code: str, said: str) -> None:
    """Error: one clear diagnostic with code and place; the model stays as it was."""
    model = zoo.tiny("llama")
    wanted = zoo.logits(model, zoo.inputs(model))
    with pytest.raises(SurgeryError) as caught:
        surgery.apply(surgery.parse(program), model)
    assert code in {each.code for each in caught.value.diagnostics}
    assert said in str(caught.value)
    assert torch.equal(zoo.logits(model, zoo.inputs(model)), wanted)
    assert not any(type(module).__name__ == "Rewritten" for module in model.modules())


def test_all_problems_come_at_once() -> None:
    """Error: every statement that does not fit is named in one go."""
    with pytest.raises(PlanError) as caught:
        surgery.plan(
            surgery.parse("lora rank 5000 on attn.q\nprune magnitude 2:4 on ffn.down\nlora rank 2 on cross.q"),
            zoo.tiny("llama"),
        )
    assert len(caught.value.diagnostics) >= 3


def test_a_second_program_is_planned_with_the_first() -> None:
    """Error: what both claim is a conflict of the two programs; what they do not is one plan."""
    model = surgery.apply(surgery.parse("lora rank 2 on attn.q"), zoo.tiny("llama"))
    with pytest.raises(PlanError, match=r"lora rank 3 on attn\.q") as caught:
        surgery.plan(surgery.parse("lora rank 3 on attn.q"), model)
    assert caught.value.diagnostics[0].code == "S103"
    both = surgery.plan(surgery.parse("lora rank 2 on attn.k"), model)
    assert [str(step.statement) for step in both.steps] == ["lora rank 2 on attn.k", "lora rank 2 on attn.q"]
