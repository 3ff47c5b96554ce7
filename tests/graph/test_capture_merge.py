"""What is merged into a module with a forward of its own: a weight that it makes the map of, or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import surgery
from surgery.graph.affine import NotAffine
from surgery.graph.fold import fold
from surgery.graph.module import Rewritten, added_parameters
from surgery.operations.lora import Lora
from surgery.verify.bounds import relative_error
from tests import zoo
from tests.graph.forwards import (
    FED,
    Cut,
    Doubled,
    OfNormOne,
    OneMore,
    PositivePart,
    Rectified,
    Squared,
    Squashed,
    TimesItsMean,
    applied,
    decoder,
)
from tests.graph.rewriting import holder, rewrite
from tests.trained import trained, trained_under


@pytest.mark.parametrize("kind", [Squared, PositivePart, Squashed, Rectified])
def test_what_is_not_affine_stays_as_it_is_and_the_rest_merges(kind: type[nn.Linear]) -> None:
    """merges: a place that no matrix can stand for keeps its graph; every other place is folded, and all compute on."""
    model = trained(applied("lora rank 2 on all linear", decoder(kind, "wv")))
    wanted = model(*FED).detach()
    places = sum(isinstance(each, Rewritten) for each in model.modules())
    surgery.merge(model)
    left = {path for path, each in model.named_modules() if isinstance(each, Rewritten)}
    assert left == {f"blocks.{number}.wv" for number in range(3)} < {*left, *range(places)}
    assert relative_error(model(*FED).detach(), wanted) <= 1e-5
    surgery.merge(model)
    assert relative_error(model(*FED).detach(), wanted) <= 1e-5


def test_a_plan_tells_what_will_not_merge_and_why() -> None:
    """Planning: a nonlinearity inside a place is a warning, before anything is done."""
    program = surgery.parse("lora rank 2 on attn.v")
    plan = surgery.plan(program, decoder(Rectified, "wv"), example_inputs=FED)
    told = [each for each in plan.warnings if "merge" in each]
    assert told, plan.warnings
    assert any("relu" in each and "blocks.0.wv" in each for each in told), told
    assert all(each in str(plan).replace("\n", " ") or each.split()[0] in str(plan) for each in told)
    assert not any("merge" in each for each in surgery.plan(program, decoder(nn.Linear), example_inputs=FED).warnings)


def test_a_weight_that_is_changed_before_its_use_is_solved_for() -> None:
    """merges: the class stays, and the weight that it stores is the one from which its forward makes the merged map."""
    model = decoder(Doubled)
    before = [block.lift.weight.detach().clone() for block in model.blocks]
    trained(applied("lora rank 2 alpha 3 on ffn.up", model))
    added = {name: tensor.detach().clone() for name, tensor in surgery.parameters(model).items()}
    wanted = model(*FED).detach()
    surgery.merge(model)
    assert relative_error(model(*FED).detach(), wanted) <= 1e-5
    for number, (block, old) in enumerate(zip(model.blocks, before, strict=True)):
        assert type(block.lift) is Doubled
        a, b = (added[f"blocks.{number}.lift.lora_{letter}"] for letter in "AB")
        torch.testing.assert_close(block.lift.weight.detach(), old + 1.5 * (b @ a) / 2, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(block.lift.weight, old)


def test_a_place_that_is_not_solved_for_keeps_its_graph() -> None:
    """merges: it computes on, as itself or rewritten, never as another class; its neighbours are folded."""
    model = trained(applied("lora rank 2 on ffn.up + ffn.down", decoder(OneMore)))
    wanted = model(*FED).detach()
    surgery.merge(model)
    assert relative_error(model(*FED).detach(), wanted) <= 1e-5
    for block in model.blocks:
        assert isinstance(block.lift, (Rewritten, OneMore))
        assert type(block.drop) is nn.Linear


def test_no_weight_is_stored_that_would_not_do() -> None:
    """merges: where the forward cuts entries away, a full matrix cannot come from any weight, and folding says so."""
    made = rewrite(Cut(6, 9), Lora(rank=2))
    fold(made)
    made = rewrite(Cut(6, 9), Lora(rank=2))
    made.get_parameter("a0_lora_B").data.fill_(0.5)
    with pytest.raises(NotAffine):
        fold(made)


@pytest.mark.parametrize("kind", [Doubled, Cut, OfNormOne, TimesItsMean])
def test_a_fold_gives_the_right_numbers_or_none(kind: type[nn.Linear]) -> None:
    """merges: what is put back computes what was there; a forward that cannot be undone is no plain map."""
    torch.manual_seed(0)
    made, x = rewrite(kind(6, 9), Lora(rank=2)), torch.randn(2, 3, 6)
    for parameter in added_parameters(holder(made)).values():
        parameter.data.normal_()
    wanted = made(x)
    try:
        merged = fold(made)
    except NotAffine:
        merged = made
    assert relative_error(merged(x), wanted) <= 1e-5


def test_a_merge_into_a_scaled_embedding_keeps_its_class_and_loads(tmp_path: Path) -> None:
    """merges: the factor of the lookup's own forward stays where it is, so that the files load as that model."""
    model = zoo.tiny("gemma")
    kind, before = type(model.model.embed_tokens), model.model.embed_tokens.weight.detach().clone()
    assert kind is not nn.Embedding
    trained_under("lora rank 2 on embed", model)
    fed = zoo.inputs(model)
    wanted = zoo.logits(model, fed)
    assert relative_error(wanted, zoo.logits(zoo.tiny("gemma"), fed)) > 1e-3
    surgery.merge(model)
    merged = zoo.logits(model, fed)
    assert relative_error(merged, wanted) <= 1e-5
    assert type(model.model.embed_tokens) is kind
    assert relative_error(model.model.embed_tokens.weight.detach(), before) < 1, "the factor must not be in the table"
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(zoo.logits(again, fed), merged)


def test_a_merge_without_training_changes_no_bit_of_a_scaled_embedding() -> None:
    """merges: what adds nothing changes nothing."""
    model = surgery.apply(surgery.parse("lora rank 2 on embed"), zoo.tiny("gemma"))
    surgery.merge(model)
    found, wanted = model.model.embed_tokens.weight, zoo.tiny("gemma").model.embed_tokens.weight
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
