"""Laws of plans: what they refuse, count and leave open, and that order means nothing."""

from __future__ import annotations

import json
import random

import pytest
import torch

import surgery
from surgery.graph.module import rewritten
from surgery.language.program import Program
from surgery.operations.adapter import Adapter
from surgery.operations.sparse import Sparse
from tests.properties import hand
from tests.properties.case import Case, Law, bits, same
from tests.properties.drawn import ANY, FLOATS, anything, cases, plain_loras


def conflicts_are_refused(case: Case) -> None:
    """Two statements that cannot commute: an error that names both."""
    pairs = (
        "quantize ffn fp4\nquantize base nf4",
        "lora rank 1 on attn.q\nlora rank 2 on attn.q,v",
        "ia3\nia3 on attn.q,v",
        "quantize base nf4\ntrain all layers",
        "optimize adamw lr 0.1\noptimize sgd lr 0.1",
        "train ffn\nfreeze ffn",
    )
    for pair in pairs:
        program = surgery.parse(pair)
        with pytest.raises(surgery.SurgeryError) as refused:
            case.plan(program)
        assert all(str(statement) in str(refused.value) for statement in program.statements)


def plans_are_reproducible(case: Case) -> None:
    first = json.dumps(case.plan().to_json())
    assert json.dumps(case.plan().to_json()) == first
    steps = json.loads(first)["steps"]
    permuted = Program(tuple(reversed(case.program.statements)), seed=case.program.seed)
    assert json.loads(json.dumps(case.plan(permuted).to_json()))["steps"] == steps


def plans_count_what_changes(case: Case) -> None:
    plan = case.plan()
    model = case.apply()
    parts = [part for step in plan.steps for part in step.parts if step.operation.rewrites(part)]
    paths = {part.path for part in parts}
    if any(part.kind == "entry" for part in parts):  # what comes in front of the tokens is read at every attention call
        paths |= {part.path for part in plan.anatomy.parts if part.kind == "attention"}
    assert {path.removesuffix(".surgery_edge").removeprefix("surgery_prompt") for path, _ in rewritten(model)} == paths
    told = {id(tensor): tensor.numel() for tensor in model.parameters() if tensor.requires_grad}
    assert sum(tensor.numel() for tensor in surgery.parameters(model).values()) == sum(told.values())
    sparse = [step.parts for step in plan.steps if isinstance(step.operation, Sparse)]
    zeros = sum(int((model.get_parameter(f"{part.path}.weight") == 0).sum()) for parts in sparse for part in parts)
    assert sum(told.values()) - zeros == plan.cost.trainable
    for step in plan.steps:
        if not any(part.kind == "attention" for part in step.parts) and step.operation.granularity == "part":
            wanted = hand.spots(step.statement.selector, case.model.shape)
            if isinstance(step.operation, Adapter):
                wanted = {(layer, role.partition(".")[0]) for layer, role in wanted}
            found = {(part.layer, part.role) for part in step.parts}
            assert found == wanted, "a selector finds other places than it says"


def order_means_nothing(case: Case) -> None:
    model = case.apply()
    statements = list(case.program.statements)
    random.Random(len(statements)).shuffle(statements)
    permuted = Program(tuple(reversed(statements)), seed=case.program.seed)
    other = case.apply(permuted)
    assert same(bits(model), bits(other))
    assert torch.equal(case.run(model), case.run(other))


def seeds_tell_tensors_apart(case: Case) -> None:
    tensors = [t for name, t in surgery.parameters(case.apply()).items() if "lora_A" in name]
    for index, one in enumerate(tensors):
        for other in tensors[index + 1 :]:
            assert one.shape != other.shape or not torch.equal(one, other), "two places drew the same numbers"
    reseeded = case.apply(Program(case.program.statements, seed=case.program.seed + 1))
    others = [t for name, t in surgery.parameters(reseeded).items() if "lora_A" in name]
    assert all(not torch.equal(one, other) for one, other in zip(tensors, others, strict=True))


LAWS: tuple[Law, ...] = (
    Law(
        "conflicts",
        "statements that cannot commute are refused, both named",
        conflicts_are_refused,
        cases(plain_loras),
    ),
    Law("plans reproduce", "same plan every time and in every order", plans_are_reproducible, ANY),
    Law("plans count", "the plan names what changes, and only that", plans_count_what_changes, ANY),
    Law("order", "permuted statements give the same bits", order_means_nothing, cases(anything, FLOATS), 2),
    Law("seeds", "every tensor draws numbers of its own", seeds_tell_tensors_apart, cases(plain_loras)),
)
