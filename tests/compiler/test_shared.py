"""Modules that stand in several places: rewritten, counted, told, copied and merged as the one that they are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import surgery
from surgery.errors import PlanError
from surgery.graph.module import Rewritten
from surgery.verify.bounds import relative_error
from tests import zoo
from tests.trained import trained_under

FED = (zoo.tokens(51),)


def sharing() -> zoo.PlainDecoder:
    """One module is the wide projection of two blocks."""
    model = zoo.plain("nano", dtype=torch.float32)
    model.blocks[1].wide = model.blocks[0].wide
    return model


def test_a_shared_module_is_rewritten_once_with_the_adapters_of_all_its_places() -> None:
    """Planning: two statements on two places of one module meet in one graph; what is planned is what is made."""
    program = surgery.parse("lora rank 2 on ffn.up in layers 0 as a\nlora rank 3 on ffn.up in layers 1 as b")
    model = sharing()
    before = model(*FED).detach()
    plan = surgery.plan(program, model, example_inputs=FED)
    surgery.apply(plan, model)
    site = model.blocks[0].wide
    assert isinstance(site, Rewritten)
    assert model.blocks[1].wide is site
    assert site.branches() == {"a", "b"}
    assert torch.equal(model(*FED), before)
    added = surgery.parameters(model)
    assert len(added) == 4
    assert sum(tensor.numel() for tensor in added.values()) == plan.cost.trainable == (2 + 3) * (21 + 44)
    for name, tensor in added.items():
        tensor.data.add_(0.1 * torch.randn(tensor.shape, generator=zoo.seeded(5, name)))
    seen = [model(*FED).detach()]
    for name in ("a", "b"):
        surgery.activate(model, name)
        seen.append(model(*FED).detach())
    assert not any(torch.equal(one, two) for i, one in enumerate([before, *seen]) for two in seen[i:])
    surgery.activate(model)
    assert torch.equal(model(*FED), seen[0])
    surgery.merge(model)
    assert relative_error(model(*FED).detach(), seen[0]) <= 1e-5
    assert type(model.blocks[0].wide) is nn.Linear
    assert model.blocks[1].wide is model.blocks[0].wide


@pytest.mark.parametrize("program", ["lora rank 2 on ffn.up", "lora rank 2 dora on all linear\nquantize attn nf4"])
def test_a_shared_module_counts_once(program: str) -> None:
    """Planning: trained numbers and bytes are those of the model, where one statement finds the module twice."""
    model = sharing()
    plan = surgery.plan(surgery.parse(program), model, example_inputs=FED)
    surgery.apply(plan, model)
    assert sum(tensor.numel() for tensor in surgery.parameters(model).values()) == plan.cost.trainable
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    assert sum(t.numel() * t.element_size() for t in tensors) == plan.cost.bytes_after


def test_one_place_of_a_shared_module_is_told_to_be_more() -> None:
    """Planning: whoever selects a shared module in one layer is warned that it stands in another."""
    program = surgery.parse("lora rank 2 on ffn.up in layers 1")
    plan = surgery.plan(program, sharing(), example_inputs=FED)
    told = [each for each in plan.warnings if "blocks.0.wide" in each and "merging" not in each]
    assert len(told) == 1, plan.warnings
    assert str(program.statements[0]) in told[0]
    assert "blocks.1.wide" in told[0]
    alone = surgery.plan(program, zoo.plain("nano", dtype=torch.float32), example_inputs=FED)
    assert not any("blocks.0.wide" in each for each in alone.warnings)
    whole = surgery.plan(surgery.parse("lora rank 2 on ffn.up"), sharing(), example_inputs=FED)
    assert not [each for each in whole.warnings if "too" in each], "all its places were selected"


def test_a_shared_module_is_not_untied_by_a_merge() -> None:
    """Planning: a warning is true. One module that stands twice stays one; two modules with one tensor become two."""
    program = surgery.parse("lora rank 2 on ffn.up")
    assert not [w for w in surgery.plan(program, sharing(), example_inputs=FED).warnings if "unties" in w]
    tied = zoo.plain("nano", dtype=torch.float32)
    tied.blocks[1].wide.weight = tied.blocks[0].wide.weight
    told = [w for w in surgery.plan(program, tied, example_inputs=FED).warnings if "unties" in w]
    assert told
    assert all("blocks.0.wide" in each and "blocks.1.wide" in each for each in told)


def test_statements_that_meet_in_a_shared_module_can_conflict() -> None:
    """Error: two adapters without a name meet there, whatever layers they were asked for in."""
    program = surgery.parse("lora rank 2 on ffn.up in layers 0\nlora rank 3 on ffn.up in layers 1")
    with pytest.raises(PlanError) as caught:
        surgery.plan(program, sharing(), example_inputs=FED)
    assert {each.code for each in caught.value.diagnostics} == {"S103"}
    surgery.plan(program, zoo.plain("nano", dtype=torch.float32), example_inputs=FED)


def test_a_copy_of_a_model_with_shared_places_shares_them_too() -> None:
    """frame: copied once, standing twice, switched alone."""
    model = trained_under("lora rank 2 on ffn.up", sharing(), FED)
    copied = copy.deepcopy(model)
    assert copied.blocks[0].wide is copied.blocks[1].wide
    assert torch.equal(copied(*FED), model(*FED))
    with surgery.disabled(copied):
        assert torch.equal(copied(*FED), sharing()(*FED))
        assert not torch.equal(model(*FED), sharing()(*FED))
