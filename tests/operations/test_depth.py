"""Layers left out and repeated: numbering, caches, configurations, silence, and what other statements see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import surgery
from surgery.compiler.record import record_of
from surgery.errors import GraphError, PlanError
from tests import zoo
from tests.reference_decoder import ReferenceDecoder, Shape, reference_decoder
from tests.refusals import assert_refused

SHAPE = Shape(layers=4, bias=True)
TOKENS = zoo.tokens(SHAPE.vocabulary, 2, 5, 0)


def reshaped(program: str, family: str, **changes: Any) -> Any:
    return surgery.apply(surgery.parse(program), zoo.tiny(family, **changes))


def decoder(program: str = "", shape: Shape = SHAPE) -> ReferenceDecoder:
    model = reference_decoder(shape, 0, torch.float64)
    return surgery.apply(surgery.parse(program), model, example_inputs=(TOKENS,)) if program else model


def by_hand(order: list[int]) -> ReferenceDecoder:
    """The reference decoder with its layers in another order, repeated ones sharing their tensors."""
    model = decoder()
    model.layers = nn.ModuleList([model.layers[index] for index in order])
    return model


@torch.no_grad()
def run(model: nn.Module) -> Tensor:
    found: Tensor = model(TOKENS)
    return found


@pytest.mark.parametrize(
    ("program", "order"),
    [
        ("drop layers 1", [0, 2, 3]),
        ("drop layers -2..-1", [0, 1]),
        ("drop layers odd", [0, 2]),
        ("drop layers 0 + layers 2", [1, 3]),
        ("repeat layers 1..2", [0, 1, 2, 1, 2, 3]),
        ("repeat layers even", [0, 0, 1, 2, 2, 3]),
        ("repeat all layers", [0, 1, 2, 3, 0, 1, 2, 3]),
        ("drop layers 0 ; repeat layers 3", [1, 2, 3, 3]),
    ],
)
def test_the_layers_are_those_asked_for(program: str, order: list[int]) -> None:
    """Against the same layers lined up by hand, to the bit."""
    model = decoder(program)
    assert torch.equal(run(model), run(by_hand(order)))
    assert not torch.equal(run(model), run(decoder()))
    assert len(model.layers) == len(order)
    assert len({id(tensor) for tensor in model.parameters()}) == len(list(model.parameters()))


DEEPER = [(family, ("drop layers 1", "repeat layers 0..1")[i % 2]) for i, family in enumerate(zoo.FAMILIES)]
REPLAYED = ("t5", "repeat layers 0")  # no configuration gives a second layer a table of positions


@pytest.mark.parametrize(("family", "program"), [*DEEPER, ("llama", "repeat layers 0..1"), REPLAYED])
def test_transformers_models_keep_caches_and_load_without_us(family: str, program: str, tmp_path: Path) -> None:
    model = zoo.tiny(family, **({"num_layers": 3} if family == "t5" else {}))
    stacks = surgery.study(model).stacks
    program = f"{program} in {stacks[-1].name}"
    fed = zoo.inputs(model)
    base = zoo.logits(model, fed)
    surgery.apply(surgery.parse(program), model)
    found = zoo.logits(model, fed)
    assert not torch.equal(found, base)
    assert record_of(model).shape == ("replay" if program.startswith(REPLAYED[1]) and family == "t5" else "config")
    if hasattr(model, "generate") and family != "bert":
        said = {"max_new_tokens": 4, "do_sample": False}
        cached = model.generate(**fed, use_cache=True, **said)
        assert torch.equal(cached, model.generate(**fed, use_cache=False, **said))
    surgery.save(model, tmp_path / "out")
    assert torch.equal(zoo.logits(surgery.load(tmp_path / "out"), fed), found)
    if record_of(model).shape == "config":
        loaded, told = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not told["missing_keys"]
        assert not told["unexpected_keys"]
        assert torch.equal(zoo.logits(loaded.eval(), fed), found)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "phi3", "gpt2", "gpt_neox", "opt", "t5", "mixtral"])
def test_silent_copies_change_no_bit_and_learn(family: str) -> None:
    program = "repeat layers 0..1 silent ; train layers 2..3"
    model = zoo.tiny(family)
    fed, before = zoo.inputs(model), sum(p.numel() for p in model.parameters())
    base = zoo.logits(model, fed)
    surgery.apply(surgery.parse(program), model)
    assert torch.equal(zoo.logits(model, fed), base)
    assert sum(p.numel() for p in model.parameters()) > before
    names = [name for name, _ in model.named_parameters() if f".{2}." in name]
    model(
        **fed, labels=fed["input_ids"] if "decoder_input_ids" not in fed else fed["decoder_input_ids"]
    ).loss.backward()
    gradients = [model.get_parameter(name).grad for name in names]
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


def test_other_statements_see_the_layers_that_are_left() -> None:
    model = decoder("drop layers 0..1 ; lora rank 2 on attn.q in layers 0..1 ; quantize ffn nf4")
    added = {name.rpartition(".")[0] for name in surgery.parameters(model)}
    assert {name.split(".")[1] for name in added} == {"0", "1"}
    assert surgery.verify(model, example_inputs=(TOKENS,))
    with surgery.disabled(model):
        half = run(model)
    assert torch.equal(half, run(decoder("drop layers 0..1 ; quantize ffn nf4")))


def test_the_order_of_statements_does_not_matter() -> None:
    statements = ["drop layers 1", "repeat layers 2 silent", "lora rank 2 on attn.q"]
    one, other = (decoder(" ; ".join(order)).state_dict() for order in (statements, statements[::-1]))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_plan_changes_nothing_and_tells_both_depths() -> None:
    model = zoo.tiny("llama")
    before = {name: id(tensor) for name, tensor in model.named_parameters()}
    plan = surgery.plan(surgery.parse("drop layers 2 ; lora rank 1 on ffn.up"), model)
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == before
    assert model.config.num_hidden_layers == 3
    assert "3 -> 2 decoder layers" in str(plan)
    assert json.loads(json.dumps(plan.to_json()))["totals"]["bytes_before"] == sum(
        tensor.numel() * 4 for tensor in (*model.parameters(), *model.buffers())
    )
    surgery.apply(plan, model)
    counted = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    assert counted == plan.cost.bytes_after
    assert model.config.num_hidden_layers == 2


def test_ties_stay_ties_and_shared_layers_stay_shared() -> None:
    model = reshaped("repeat layers 1", "qwen2")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    model = decoder("repeat layers 1", Shape(layers=2, tied=True))
    assert torch.equal(run(model).isfinite(), torch.ones_like(run(model), dtype=torch.bool))
    assert model.embed.weight is model.head.weight


def test_a_failure_later_on_puts_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from surgery.operations.lora import Lora

    def fail(*args: Any) -> None:
        raise GraphError.of("S300", "on purpose")

    model = zoo.tiny("llama")
    fed = zoo.inputs(model)
    base, names = zoo.logits(model, fed), list(model.state_dict())
    monkeypatch.setattr(Lora, "fill", fail)
    with pytest.raises(GraphError, match="on purpose"):
        surgery.apply(surgery.parse("drop layers 0 ; lora rank 1 on ffn"), model)
    assert torch.equal(zoo.logits(model, fed), base)
    assert list(model.state_dict()) == names
    assert model.config.num_hidden_layers == 3


@pytest.mark.parametrize(
    ("program", "family", "code", "words"),
    [
        ("drop all layers", "llama", "S131", "no layer"),
        ("drop layers 7", "llama", "S205", "0..2"),
        ("drop attn", "llama", "S131", "whole layers"),
        ("drop layers 1 ; repeat layers 1", "llama", "S103", "drop layers 1"),
        ("drop layers 0 in decoder", "t5", "S131", "table of positions"),
        ("repeat layers 1 silent", "bert", "S101", "no copy can be silent"),
        ("drop layers 1 on ffn", "llama", "S007", ""),
    ],
)
def test_bad_input_is_refused_while_planning(program: str, family: str, code: str, words: str) -> None:
    assert_refused(program, zoo.tiny(family), code, words)


def test_a_bias_that_no_selector_reaches_is_noticed() -> None:
    """gpt_oss adds a bias for each expert, which the graph reads apart from the experts' products."""
    model = zoo.tiny("gpt_oss")
    fed = zoo.inputs(model)
    base = zoo.logits(model, fed)
    with pytest.raises(GraphError) as caught:
        surgery.apply(surgery.parse("repeat layers 1 silent"), model)
    assert caught.value.diagnostics[0].code == "S331"
    assert torch.equal(zoo.logits(model, fed), base)


def test_a_transformed_model_is_not_reshaped() -> None:
    model = reshaped("lora rank 1 on ffn", "llama")
    with pytest.raises(PlanError) as caught:
        surgery.apply(surgery.parse("drop layers 1"), model)
    assert caught.value.diagnostics[0].code == "S133"
    other = reshaped("drop layers 1", "llama")
    surgery.apply(surgery.parse("lora rank 1 on ffn in layers 1"), other)
    assert {name.split(".")[2] for name in surgery.parameters(other)} == {"1"}
    assert surgery.verify(other)
    merged = surgery.merge(other)
    assert record_of(merged) is None
    surgery.apply(surgery.parse("drop layers 1"), merged)
    assert len(merged.model.layers) == 1


@pytest.mark.parametrize(
    "kind", ["FalconH1ForCausalLM", "XLNetLMHeadModel"], ids=["a pair that is no list of layers", "matrices by heads"]
)
def test_odd_families(kind: str) -> None:
    cls: Any = getattr(transformers, kind)
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    sizes |= {"head_dim": 8, "num_key_value_heads": 2}
    if kind.startswith("XLNet"):
        sizes = {"n_layer": 2, "d_model": 32, "d_inner": 48, "n_head": 4}
    model = cls(cls.config_class(vocab_size=61, **sizes)).eval()
    surgery.apply(surgery.parse("drop layers 1"), model)
    assert [stack.depth for stack in surgery.study(model).stacks] == [1]
    assert surgery.verify(model), str(surgery.verify(model))
    assert model(torch.tensor([[3, 5, 8]]))[0].isfinite().all()
