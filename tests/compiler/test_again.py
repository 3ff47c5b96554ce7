"""A second program on a transformed model: as if both had been one, or refused with nothing changed."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

import surgery
from surgery.compiler.record import record_of
from surgery.errors import PlanError
from tests import zoo
from tests.properties.case import bits, randomise, same
from tests.reference_decoder import ReferenceDecoder, Shape, reference_decoder

SHAPE = Shape(layers=2)
TOKENS = zoo.tokens(SHAPE.vocabulary, 2, 5, 0)


def build(shape: Shape = SHAPE) -> ReferenceDecoder:
    return reference_decoder(shape, 0, torch.float64)


def apply(text: str, model: nn.Module) -> nn.Module:
    tokenizer = zoo.tokenizer(SHAPE.vocabulary)
    return surgery.apply(surgery.parse(text), model, example_inputs=(TOKENS,), tokenizer=tokenizer)


def wants_gradients(model: nn.Module) -> set[str]:
    return {name for name, tensor in model.named_parameters() if tensor.requires_grad}


LORA = "lora rank 2 on attn.q"
COMPOSING = [
    (LORA, "quantize base nf4"),
    ("lora rank 2 init pissa on attn.v", "prefix 2 on all layers"),
    ("quantize base nf4 double", LORA),
    ("quantize base nf4", "prefix 2 on all layers"),  # all that an attention has are codes
    ("quantize base nf4 ; lora rank 1 on attn", 'instruct "w5 w6" cached'),
    (LORA, "prune magnitude 50% on attn"),
    ("prune magnitude 50% on attn.q", "prune magnitude 30% on attn.k"),
    ("lora rank 2 dora on all linear", "prune magnitude 50% on ffn ; quantize base fp4"),
    ("lora rank 1 on attn.q", "lora rank 2 on attn.q as second"),
    ("lora rank 2 on attn.q as second", "lora rank 1 on attn.q"),
    ("lora rank 2 init pissa on attn.q", "prune magnitude 50% on ffn"),
    ("prefix 2 via mlp 5 on all layers", "prefix 2 gated on layers 0 as second"),
    ('prefix 3 init text "w5 w6 w7"', "prune magnitude 50% on all linear"),
    ('prefix 3 init text "w5 w6 w7"', 'prefix 2 init text "w8 w9" as first'),
    ("prune magnitude 50% on ffn", 'prefix 3 init text "w5 w6 w7"'),
    ("adapter bottleneck 3 after ffn", "lora rank 2 on ffn ; quantize base nf4"),
    ("quantize base nf4", "adapter bottleneck 3 after attn, ffn"),
    ("adapter bottleneck 3 after ffn as last", "adapter bottleneck 3 then last after ffn as first"),
    ("ia3", "quantize base nf4 ; lora rank 1 on ffn.down"),
    ("train norm", "lora rank 2 on ffn"),
    ("train ffn, norm", "freeze norm ; prune magnitude 20% on ffn"),
    ("train bias add", "lora rank 2 on attn"),
    (LORA, "optimize adamw lr 0.1"),
    (LORA, "quantize base int8"),
    ("quantize base int8", "lora rank 1 on ffn ; prefix 2 on all layers"),
    ("prune magnitude 50% on ffn ; lora rank 2 dora on all linear", "quantize attn int8 ; quantize ffn nf4"),
    ("prompt 3", "prefix 2 on all layers"),
    ('instruct "w5 w6" cached', "prune magnitude 50% on ffn"),
    ("lora rank 2 on embed + head", "lora rank 2 on attn.q"),
    ("seed 3 ; " + LORA, "lora rank 1 on ffn"),
]


@pytest.mark.parametrize("shape", [SHAPE, Shape(layers=1, fused=True, bias=True, attention="hand", tied=True)], ids=str)
@pytest.mark.parametrize(("first", "second"), COMPOSING, ids=lambda text: text)
def test_two_programs_are_one(first: str, second: str, shape: Shape) -> None:
    """Bits, logits, plan, what is trained and what is remembered are those of one program."""
    wanted = apply(f"{first}\n{second}", build(shape))
    model = apply(first, build(shape))
    alone = bits(model)
    apply(second, model)
    assert same(bits(model), bits(wanted))
    assert torch.equal(model(TOKENS), wanted(TOKENS))
    for each in (model, wanted):
        randomise(each)
    assert torch.equal(model(TOKENS), wanted(TOKENS))
    with surgery.disabled(model), surgery.disabled(wanted):
        assert torch.equal(model(TOKENS), wanted(TOKENS))
    assert not same(bits(model), alone) or "freeze" in second or "optimize" in second
    found, expected = record_of(model), record_of(wanted)
    assert found is not None
    assert expected is not None
    assert found.plan.to_json() == expected.plan.to_json()
    assert found.start == expected.start
    assert found.untouched == expected.untouched
    assert wants_gradients(model) == wants_gradients(wanted)


@pytest.mark.parametrize(("first", "second"), COMPOSING[:12:2], ids=lambda text: text)
def test_a_saved_model_takes_a_second_program(first: str, second: str, tmp_path: Path) -> None:
    """Saved, loaded, transformed again, saved and loaded: still as one program."""
    wanted = apply(f"{first}\n{second}", build())
    surgery.save(apply(first, build()), tmp_path / "one")
    model = apply(second, surgery.load(tmp_path / "one", model=build()))
    assert same(bits(model), bits(wanted))
    assert wants_gradients(model) == wants_gradients(wanted)
    surgery.save(model, tmp_path / "two")
    again = surgery.load(tmp_path / "two", model=build())
    assert same(bits(again), bits(wanted))
    assert torch.equal(again(TOKENS), wanted(TOKENS))


@pytest.mark.parametrize(("first", "second"), [p for p in COMPOSING if "ffn, norm" not in p[0]], ids=lambda text: text)
def test_what_was_trained_stays(first: str, second: str) -> None:
    model = apply(first, build())
    trained = {name: tensor.clone() for name, tensor in randomise(model).items()}
    apply(second, model)
    now = dict(model.named_parameters())
    for name, tensor in trained.items():
        assert torch.equal(now[name], tensor), name


LATE = [
    ("quantize base nf4", "prune magnitude 50% on attn.q"),
    ("quantize base nf4", "prune random 50% on attn.q"),
    ("quantize base nf4", "lora rank 1 init pissa on attn.q"),
    ("quantize base nf4", "lora rank 1 init loftq 3 on attn.q"),
    ("lora rank 1 init pissa on attn.q", "quantize base nf4"),
    ("quantize base int8", "prune magnitude 50% on attn.q"),
    ("quantize base int8", "lora rank 1 init pissa on attn.q"),
]


@pytest.mark.parametrize(("first", "second"), LATE, ids=lambda text: text)
def test_what_comes_too_late_is_refused_and_changes_nothing(first: str, second: str) -> None:
    model = apply(first, build())
    randomise(model)
    before, logits, wanted = bits(model), model(TOKENS), wants_gradients(model)
    modules = {id(module) for module in model.modules()}
    with pytest.raises(PlanError) as refused:
        apply(f"{second}\nlora rank 2 on ffn as other", model)
    (diagnostic,) = refused.value.diagnostics
    assert diagnostic.code == "S106"
    assert first in diagnostic.message
    assert second in diagnostic.message
    assert diagnostic.span is not None
    assert diagnostic.span.text == second
    assert same(bits(model), before)
    assert torch.equal(model(TOKENS), logits)
    assert wants_gradients(model) == wanted
    assert {id(module) for module in model.modules()} == modules


def test_trained_weights_are_not_pruned_as_if_they_had_not_been() -> None:
    """Untrained, a mask comes first, as in one program; trained, it would have been chosen from other weights."""
    model = apply("train ffn", build())
    apply("prune magnitude 50% on ffn", copy.deepcopy(model))
    randomise(model)
    with pytest.raises(PlanError, match="trained") as refused:
        apply("prune magnitude 50% on ffn", model)
    assert refused.value.diagnostics[0].code == "S106"


def test_a_trained_dora_keeps_its_norms_and_an_untrained_one_takes_new_ones() -> None:
    trained, untrained = apply("lora rank 2 dora on attn.q", build()), apply("lora rank 2 dora on attn.q", build())
    name = "layers.0.attention.q.lora_magnitude"
    with torch.no_grad():
        surgery.parameters(trained)["layers.0.attention.q.lora_B"].add_(1)
    before = trained.get_parameter(name).clone()
    for model in (trained, untrained):
        apply("prune magnitude 50% on attn.q", model)
    assert torch.equal(trained.get_parameter(name), before)
    assert not torch.equal(untrained.get_parameter(name), before)


def test_conflicts_name_both_statements_and_the_program() -> None:
    model = apply("lora rank 2 on attn.q", build())
    with pytest.raises(PlanError) as refused:
        apply("lora rank 1 on attn.q,v", model)
    (diagnostic,) = refused.value.diagnostics
    assert diagnostic.code == "S103"
    assert "lora rank 2 on attn.q" in diagnostic.message
    assert "lora rank 1 on attn.q,v" in diagnostic.message
    assert "of the program before" in str(diagnostic.label)
    assert diagnostic.span is not None
    assert diagnostic.span.text == "lora rank 1 on attn.q,v"


def test_a_failure_on_the_way_changes_nothing() -> None:
    """A third statement fails while it is filled, when others have been written already."""
    model = apply("lora rank 2 dora on all linear", build())
    before, logits = bits(model), model(TOKENS)
    plan = surgery.plan(surgery.parse("quantize base nf4\nlora rank 2 on attn.q as b"), model)
    broken = dataclasses.replace(plan.steps[-1], statement=plan.steps[-1].statement)
    object.__setattr__(broken, "parts", (dataclasses.replace(broken.parts[0], shape=(3,)),))
    bad = dataclasses.replace(plan, steps=(*plan.steps[:-1], broken))
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        surgery.apply(bad, model)
    assert same(bits(model), before)
    assert torch.equal(model(TOKENS), logits)


def test_seeds_of_two_programs() -> None:
    model = apply("seed 3\nlora rank 2 on attn.q", build())
    with pytest.raises(PlanError) as refused:
        apply("seed 4\nlora rank 2 on attn.k", model)
    assert refused.value.diagnostics[0].code == "S122"


def test_a_plan_of_another_state_is_refused() -> None:
    model = build()
    plan = surgery.plan(surgery.parse("lora rank 2 on attn.k"), model, example_inputs=(TOKENS,))
    apply("lora rank 2 on attn.q", model)
    before = bits(model)
    with pytest.raises(PlanError) as refused:
        surgery.apply(plan, model)
    assert refused.value.diagnostics[0].code == "S123"
    assert same(bits(model), before)
    later = surgery.plan(surgery.parse("lora rank 2 on attn.k"), model)
    assert "already there" in str(later)
    surgery.apply(later, model)
    assert "already there" not in str(record_of(model).plan)  # type: ignore[union-attr]


def test_switches_modes_and_hooks_stay() -> None:
    model = apply("lora rank 2 on attn.q as a\nlora rank 2 on attn.q as b", build()).train()
    surgery.activate(model, "b")
    calls: list[int] = []
    model.layers[0].attention.q.register_forward_hook(lambda *_: calls.append(1))
    apply("quantize base nf4\nlora rank 1 on attn.q as c", model)
    place = model.layers[0].attention.q
    assert place.off == {"a"}
    assert place.training
    model(TOKENS)
    assert calls == [1]
    resting = [name for name in surgery.parameters(model) if name.endswith("a_lora_A")]
    assert resting
    assert not wants_gradients(model) & set(resting)
    surgery.activate(model)
    assert set(resting) <= wants_gradients(model)


def test_three_programs_and_merge() -> None:
    wanted = surgery.merge(apply("prune magnitude 50% on ffn\nlora rank 2 on all linear\nia3", build()))
    model = apply("lora rank 2 on all linear", build())
    apply("ia3", model)
    apply("prune magnitude 50% on ffn", model)
    merged = surgery.merge(model)
    assert same(bits(merged), bits(wanted))
    apply("quantize base nf4", merged)  # plain again: takes any program
    apply("lora rank 1 on attn.q", merged)
    assert surgery.verify(merged, example_inputs=(TOKENS,))


def test_what_a_merge_keeps_takes_a_second_program() -> None:
    tied = build(Shape(layers=2, tied=True))
    randomise(apply("lora rank 2 on attn.q, head, embed\nprefix 2 via mlp 3", tied))
    merged = surgery.merge(tied)
    apply("lora rank 2 on attn.q, head\nprune magnitude 50% on head", merged)  # head is untied now
    randomise(merged)
    assert torch.isfinite(merged(TOKENS)).all()


def test_transformers_models_with_fused_projections_take_two_programs() -> None:
    for family in ("gpt2", "llama", "gpt_neox"):
        fed = zoo.inputs(zoo.tiny(family))
        first = "lora rank 2 on attn.q,v\nprefix 2 on all layers"
        second = "quantize base nf4 on ffn\nprefix 2 gated on all layers as b\nlora rank 1 on attn.k"
        second = "quantize ffn nf4\nprefix 2 gated on all layers as b\nlora rank 1 on attn.k"
        wanted = surgery.apply(surgery.parse(f"{first}\n{second}"), zoo.tiny(family))
        model = surgery.apply(surgery.parse(first), zoo.tiny(family))
        surgery.apply(surgery.parse(second), model)
        assert same(bits(model), bits(wanted)), family
        assert torch.equal(zoo.logits(model, fed), zoo.logits(wanted, fed)), family
