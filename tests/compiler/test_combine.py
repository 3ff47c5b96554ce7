"""A new adapter out of others: its change is what the method says of their changes, and it is an adapter like any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import surgery
from surgery.compiler import mixing, record_of
from surgery.errors import GraphError
from surgery.graph.fold import affine
from surgery.graph.module import rewritten
from tests import zoo
from tests.compiler.test_route import transformed
from tests.compiler.test_switch import wanting
from tests.reference_decoder import Shape, reference_decoder

PROGRAM = """
lora rank 3 alpha 7 scale rs on attn.q,v + embed as french
lora rank 2 alpha 5 on all linear except layers 1 as german
"""
SHARES = {"french": 0.7, "german": -0.4}


def changes(model: torch.nn.Module, name: str) -> dict[str, Tensor]:
    """By how much an adapter changes each weight, read off the places with it and without: (out, in) by path."""
    found = {}
    for path, site in rewritten(model):
        if name in site.branches():
            surgery.activate(model, name)
            with_it = affine(site, site.facts).dense()
            with surgery.disabled(model):
                found[path] = with_it - affine(site, site.facts).dense()
    surgery.activate(model)
    return found


def decoder(fused: bool = False) -> tuple[Any, tuple[Tensor, ...]]:
    shape = Shape(fused=fused, bias=True, width=24, ffn=23)
    tokens = (zoo.tokens(shape.vocabulary),)
    return transformed(PROGRAM, reference_decoder(shape), tokens), tokens


@pytest.mark.parametrize("fused", [False, True])
def test_linear_is_the_weighted_sum_of_the_changes(fused: bool) -> None:
    """Whatever ranks, scales and places: on slices of fused projections, on lookups, with a negative share."""
    model, tokens = decoder(fused)
    before, all_on = zoo.logits(model, tokens), surgery.parameters(model).keys()
    french, german = changes(model, "french"), changes(model, "german")
    assert surgery.combine(model, SHARES, name="both") is model
    both = changes(model, "both")
    assert both.keys() == french.keys() | german.keys()
    assert french.keys() & german.keys()
    assert french.keys() - german.keys()
    for path, found in both.items():
        wanted = sum(
            share * each[path] for each, share in zip((french, german), SHARES.values(), strict=True) if path in each
        )
        assert (found - wanted).abs().max() <= 1e-13 * found.abs().max(), path
    surgery.activate(model, "french", "german")
    assert torch.equal(zoo.logits(model, tokens), before)
    assert surgery.parameters(model).keys() > all_on


def test_it_is_off_until_it_is_wanted_and_then_an_adapter_like_any(tmp_path: Path) -> None:
    """frame, round_trip, merges, verify, plan: the new adapter is a statement of the model's program."""
    model = transformed(PROGRAM, zoo.tiny("gpt2"))
    fed = zoo.inputs(model)
    before, wanted_gradients = zoo.logits(model, fed), wanting(model)
    surgery.combine(model, SHARES, name="both")
    assert torch.equal(zoo.logits(model, fed), before)
    assert surgery.active(model) == ("french", "german")
    assert wanting(model) == wanted_gradients
    surgery.activate(model, "both")
    both = zoo.logits(model, fed)
    assert not torch.equal(both, before)
    assert all(name.startswith("both_") for name in wanting(model))
    record = record_of(model)
    assert record is not None
    lines = [str(step.statement) for step in record.plan.steps if step.statement.name == "both"]
    assert lines
    assert all(line in str(record.plan.program) and line in str(record.plan) for line in lines)
    assert surgery.parse(str(record.plan.program)) == record.plan.program
    added = sum(tensor.numel() for tensor in surgery.parameters(model).values())
    assert record.plan.cost.trainable == added
    surgery.save(model, tmp_path / "out")
    again = surgery.load(tmp_path / "out")
    assert torch.equal(zoo.logits(again, fed), both)
    assert surgery.active(again) == ("both",)
    for each in (model, again):
        surgery.activate(each)
        assert surgery.verify(each), surgery.verify(each)
    assert torch.equal(zoo.logits(again, fed), zoo.logits(model, fed))
    with surgery.route(model, ["both", "french"]):
        rows = zoo.logits(model, fed)
    assert (rows[0] - both[0]).abs().max() <= 2e-6 * both.abs().max()


@pytest.mark.parametrize("fused", [False, True])
def test_its_statements_say_where_it_is(fused: bool) -> None:
    """The program of a combined model, planned on the base, has the same parts with the same ranks."""
    model, tokens = decoder(fused)
    surgery.combine(model, SHARES, name="both")
    record = record_of(model)
    assert record is not None
    fresh = surgery.plan(
        record.plan.program, reference_decoder(Shape(fused=fused, bias=True, width=24, ffn=23)), example_inputs=tokens
    )

    def said(plan: Any) -> dict[Any, int]:
        return {
            (part.path, part.channels): step.operation.rank
            for step in plan.steps
            if step.statement.name == "both"
            for part in step.parts
        }

    assert said(fresh) == said(record.plan)
    assert len(said(fresh)) > 4


def test_svd_is_the_best_of_its_rank() -> None:
    model, _ = decoder()
    surgery.combine(model, SHARES, name="whole", method="svd", rank=5)
    surgery.combine(model, SHARES, name="exact")
    surgery.combine(model, SHARES, name="cut", method="svd")
    record = record_of(model)
    assert record is not None
    assert any("`cut` is cut to rank 2" in each or "`cut` is cut to rank 3" in each for each in record.plan.warnings)
    assert not any("`whole`" in each for each in record.plan.warnings)
    exact, whole, cut = (changes(model, name) for name in ("exact", "whole", "cut"))
    for path, wanted in exact.items():
        assert (whole[path] - wanted).abs().max() <= 1e-12 * wanted.abs().max()
        sigma = torch.linalg.svdvals(wanted)
        rank = int((torch.linalg.svdvals(cut[path]) > 1e-10 * sigma[0]).sum())
        assert rank <= 3
        lost = (cut[path] - wanted).square().sum()
        assert abs(lost - sigma[rank:].square().sum()) <= 1e-9 * sigma.square().sum()


def test_ranks_beyond_those_of_a_matrix_are_exact_too() -> None:
    """Three adapters of rank 3 on maps with four outputs: the sum has rank 4."""
    shape = Shape(width=8, heads=2, key_value_heads=1, ffn=9)
    tokens = (zoo.tokens(shape.vocabulary),)
    program = "\n".join(f"lora rank 3 on attn.k as n{i}" for i in range(3))
    model = transformed(program, reference_decoder(shape), tokens)
    each = [changes(model, f"n{i}") for i in range(3)]
    surgery.combine(model, {f"n{i}": i + 1.0 for i in range(3)}, name="sum")
    for path, found in changes(model, "sum").items():
        wanted = sum((i + 1.0) * change[path] for i, change in enumerate(each))
        assert (found - wanted).abs().max() <= 1e-13 * found.abs().max()
    assert {p.shape for n, p in surgery.parameters(model).items() if n.endswith("sum_lora_A")} == {(4, 8)}


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_methods_that_need_the_whole_matrix(method: Any) -> None:
    """With the full rank nothing is lost: the change is the formula's, and dare's is drawn from the seed alone."""
    model, _ = decoder()
    french, german = changes(model, "french"), changes(model, "german")
    for name, seed in (("one", 1), ("same", 1), ("two", 2)):
        surgery.combine(model, SHARES, name=name, method=method, density=0.5, rank=99, seed=seed)
    one, same, two = (changes(model, name) for name in ("one", "same", "two"))
    assert all(torch.equal(one[path], same[path]) for path in one)
    assert any(not torch.equal(one[path], two[path]) for path in one) == (method == "dare")
    checked, seen = 0, torch.zeros(4, dtype=torch.float64)
    for path in french.keys() & german.keys():
        if method == "ties":
            wanted = mixing.ties([french[path], german[path]], list(SHARES.values()), 0.5)
            assert (one[path] - wanted).abs().max() <= 1e-12 * wanted.abs().max()
            checked += 1
            continue
        summed = 0.7 * french[path] - 0.4 * german[path]
        apart = [one[path], 2 * 0.7 * french[path], -2 * 0.4 * german[path], 2 * summed]
        zero = 1e-12 * summed.abs().max()
        fits = torch.stack([apart[0].abs() <= zero, *((apart[0] - each).abs() <= zero for each in apart[1:])])
        assert fits.any(0).all(), "an entry is none, one or both of the two, doubled"
        seen += fits.double().mean((1, 2))
        checked += 1
    assert checked > 1
    assert method == "ties" or (seen > 0.1 * checked).all()


def test_ties_by_hand() -> None:
    """Yadav et al. 2023, figure 1: trim, elect, mean of those that agree."""
    first = torch.tensor([[3.0, -1.0, 0.1, 2.0]])
    second = torch.tensor([[-1.0, -3.0, 0.2, 4.0]])
    found = mixing.ties([first, second], [1.0, 1.0], 0.75)
    assert torch.equal(found, torch.tensor([[3.0, -2.0, 0.0, 3.0]]))
    assert torch.equal(mixing.trim(first, 0.5), torch.tensor([[3.0, 0.0, 0.0, 2.0]]))


def test_dora_is_combined_by_its_whole_change() -> None:
    """What dora adds is no low-rank matrix: svd takes all of it, linear refuses."""
    shape = Shape(width=16, ffn=13)
    tokens = (zoo.tokens(shape.vocabulary),)
    program = "lora rank 2 dora on attn.q as turned\nlora rank 2 on attn.q as plain"
    model = transformed(program, reference_decoder(shape), tokens)
    assert code(lambda: surgery.combine(model, {"turned": 1.0}, name="both")) == "S378"
    fresh = transformed("lora rank 2 dora on attn.q as turned", reference_decoder(shape), tokens)
    for name, parameter in surgery.parameters(fresh).items():
        parameter.data.copy_(surgery.parameters(model)[name])
    surgery.combine(model, {"turned": 1.0}, name="both", method="svd", rank=16)
    found, wanted = changes(model, "both"), changes(fresh, "turned")
    assert len(found) == 2
    for path, change in found.items():
        assert (wanted[path] - change).abs().max() <= 1e-12 * change.abs().max()


def code(action: Any) -> str:
    with pytest.raises(GraphError) as caught:
        action()
    return caught.value.diagnostics[0].code


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"shares": {"french": 1.0, "spanish": 1.0}}, "S310"),
        ({"shares": {}}, "S378"),
        ({"shares": {"french": float("nan")}}, "S378"),
        ({"name": "german"}, "S378"),
        ({"name": "not a name"}, "S378"),
        ({"name": "default"}, "S378"),
        ({"method": "average"}, "S378"),
        ({"rank": 3}, "S378"),
        ({"method": "svd", "rank": 0}, "S378"),
        ({"density": 0.5}, "S378"),
        ({"method": "ties"}, "S378"),
        ({"method": "dare", "density": 0.0}, "S378"),
        ({"method": "dare", "density": 1.5}, "S378"),
        ({"shares": {"french": 1.0, "far": 1.0}}, "S378"),
    ],
)
def test_what_cannot_be_combined_is_said_and_nothing_changes(settings: dict[str, Any], wanted: str) -> None:
    model = transformed(PROGRAM + "prefix 2 gated on all layers as far", zoo.tiny("llama"))
    names, modules = set(surgery.parameters(model)), list(model.modules())
    options = {"shares": SHARES, "name": "both", **settings}
    assert code(lambda: surgery.combine(model, options.pop("shares"), **options)) == wanted
    assert set(surgery.parameters(model)) == names
    assert all(one is other for one, other in zip(model.modules(), modules, strict=True))


def test_a_model_keeps_its_mode_and_hooks() -> None:
    model = transformed(PROGRAM, zoo.tiny("llama")).train()
    seen = []
    (path, *_) = (step.parts[0].path for step in record_of(model).plan.steps)  # type: ignore[union-attr]
    model.get_submodule(path).register_forward_hook(lambda *_: seen.append(path))
    surgery.combine(model, SHARES, name="both")
    model(**zoo.inputs(model))
    assert seen == [path]
    assert all(module.training for module in model.modules())
