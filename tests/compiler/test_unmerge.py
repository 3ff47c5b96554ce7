"""Merging some adapters, and taking a merge out again: the others stay, and the base's bits come back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import surgery
from surgery.compiler import record_of
from surgery.compiler.unmerge import KEPT, Rows
from surgery.errors import CheckpointError, GraphError
from surgery.graph.module import rewritten
from tests import zoo
from tests.compiler.test_combine import code
from tests.compiler.test_route import transformed
from tests.compiler.test_switch import wanting
from tests.reference_decoder import Shape, reference_decoder

PROGRAM = """
lora rank 2 on all linear + embed as french
lora rank 3 dropout 10% on attn.q,v + embed as german
ia3 on attn.k,v as scaled
prefix 3 via mlp 5 on all layers as far
"""


def bits(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Equal in every bit, with the sign of zero."""
    return one.keys() == other.keys() and all(
        a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        for a, b in zip(one.values(), other.values(), strict=True)
    )


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "t5", *(pytest.param(f, marks=pytest.mark.slow) for f in zoo.FAMILIES)]
)
def test_a_kept_merge_comes_out_to_the_bit(family: str) -> None:
    """Tensors, logits, modules, what wants gradients, ties and the configuration: all as before."""
    model = transformed(PROGRAM, zoo.tiny(family))
    fed = zoo.inputs(model)
    tensors, logits, wants = bits(model), zoo.logits(model, fed), wanting(model)
    modules = {name: (id(module), type(module)) for name, module in model.named_modules()}
    tied, record = model.config.tie_word_embeddings, record_of(model)
    surgery.merge(model, keep=True)
    merged = zoo.logits(model, fed)
    assert (merged - logits).abs().max() <= 1e-5 * logits.abs().max()
    assert not same(bits(model), tensors)
    assert surgery.unmerge(model) is model
    assert same(bits(model), tensors)
    assert torch.equal(zoo.logits(model, fed), logits)
    assert {name: (id(module), type(module)) for name, module in model.named_modules()} == modules
    assert wanting(model) == wants
    assert model.config.tie_word_embeddings == tied
    assert record_of(model) is record
    assert surgery.verify(model)
    with surgery.disabled(model):
        assert torch.equal(zoo.logits(model, fed), zoo.logits(zoo.tiny(family), fed))
    assert KEPT not in model.__dict__
    surgery.merge(model)
    assert torch.equal(zoo.logits(model, fed), merged)


def test_ties_come_back() -> None:
    model = transformed("lora rank 2 on head as french", zoo.tiny("qwen2", tie_word_embeddings=True))
    tensors = bits(model)
    surgery.merge(model, keep=True)
    assert model.config.tie_word_embeddings is False
    surgery.unmerge(model)
    assert model.config.tie_word_embeddings is True
    assert model.get_output_embeddings()._parameters["weight"] is model.get_input_embeddings().weight
    assert same(bits(model), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("base", ["", "quantize base nf4 double", "quantize base int8", "prune magnitude 50% on attn"])
def test_bits_come_back_over_every_base(base: str, dtype: torch.dtype) -> None:
    model = transformed(f"{base}\nlora rank 2 on attn.q,v as french", zoo.tiny("gpt2", dtype=dtype))
    tensors, logits = bits(model), zoo.logits(model, zoo.inputs(model))
    surgery.unmerge(surgery.merge(model, keep=True))
    assert same(bits(model), tensors)
    assert torch.equal(zoo.logits(model, zoo.inputs(model)), logits)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_of_a_fused_weight_only_the_rows_that_changed_are_kept(family: str) -> None:
    model = transformed("lora rank 2 on attn.q as french", zoo.tiny(family))
    tensors = bits(model)
    surgery.merge(model, keep=True)
    (kept,) = model.__dict__[KEPT]
    rows = {id(entry.was): entry.was for entry in kept.entries if isinstance(entry.was, Rows)}
    assert len(rows) == 3
    for each in rows.values():
        assert 3 * len(each.index) == each.other.shape[each.dim]
    full = [entry.was for entry in kept.entries if isinstance(entry.was, Tensor) and entry.was.dim() == 2]
    assert not full
    copied = copy.deepcopy(model)
    for each in (model, copied):
        assert same(bits(surgery.unmerge(each)), tensors)


def test_some_are_merged_and_the_others_stay() -> None:
    """PEFT drops the adapters that are not merged; here each still does what it did, on or off."""
    model = transformed(PROGRAM, zoo.tiny("gpt2"))
    fed = zoo.inputs(model)
    plain = transformed(PROGRAM.replace("ia3 on attn.k,v as scaled", ""), zoo.tiny("gpt2"))
    before = {}
    for names in (("french", "german", "far"), ("french", "far"), ("french",), ("french", "german")):
        surgery.activate(plain, *names)
        before[names] = zoo.logits(plain, fed)
    surgery.activate(plain)
    everything = zoo.logits(model, fed)
    tensors = bits(model)
    assert code(lambda: surgery.merge(model, only=["french"])) == "S312", "ia3 multiplies what french adds"
    surgery.merge(model, only=["french", "scaled"], keep=True)
    assert surgery.active(model) == ("far", "german")
    assert (zoo.logits(model, fed) - everything).abs().max() <= 1e-5 * everything.abs().max()
    assert not any("french" in name for name in surgery.parameters(model))
    assert any("german" in name for name in surgery.parameters(model))
    assert surgery.verify(model), surgery.verify(model)
    surgery.unmerge(model)
    assert same(bits(model), tensors)
    assert torch.equal(zoo.logits(model, fed), everything)
    surgery.merge(plain, only="french")
    for names, wanted in before.items():
        others = [name for name in names if name != "french"]
        with surgery.disabled(plain):
            alone = zoo.logits(plain, fed)
        if others:
            surgery.activate(plain, *others)
            alone = zoo.logits(plain, fed)
        assert (alone - wanted).abs().max() <= 1e-5 * wanted.abs().max(), names


@pytest.mark.parametrize("base", ["quantize base nf4", "quantize base int8", "prune magnitude 50% on ffn", ""])
def test_some_are_merged_over_every_base(base: str, tmp_path: Path) -> None:
    """What comes out is saved, loaded, verified, merged and trained like any other."""
    program = f"{base}\nlora rank 2 on ffn + attn.k as french\nlora rank 2 on attn + ffn.up as german"
    model = transformed(program, zoo.tiny("llama"))
    fed = zoo.inputs(model)
    wanted = zoo.logits(model, fed)
    surgery.activate(model, "german")
    german = zoo.logits(model, fed)
    surgery.merge(model, only=["french"])
    assert surgery.active(model) == ("german",)
    found = zoo.logits(model, fed)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (found - german).abs().max() > 1e-2 * wanted.abs().max()
    assert surgery.verify(model), surgery.verify(model)
    surgery.save(model, tmp_path / "out")
    again = surgery.load(tmp_path / "out")
    assert torch.equal(zoo.logits(again, fed), found)
    assert wanting(again) == wanting(model) == {"german_lora_A", "german_lora_B"}
    again.train()(**fed).logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in surgery.parameters(again).values())
    surgery.merge(again.eval())
    assert (zoo.logits(again, fed) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("fused", [False, True])
def test_some_are_merged_exactly_in_float64(fused: bool) -> None:
    shape = Shape(fused=fused, bias=True)
    tokens = (zoo.tokens(shape.vocabulary),)
    program = "lora rank 2 on attn.q + ffn + embed as one\nlora rank 2 on all linear as two"
    program += "\nlora rank 1 dora on attn.q as three"
    model = transformed(program, reference_decoder(shape), tokens)
    wanted = zoo.logits(model, tokens)
    assert code(lambda: surgery.merge(model, only=["one"])) == "S312", "three reads the norms of the weight"
    assert torch.equal(zoo.logits(model, tokens), wanted)
    surgery.merge(model, only=["one", "three"])
    assert (zoo.logits(model, tokens) - wanted).abs().max() <= 1e-12 * wanted.abs().max()
    assert surgery.active(model) == ("two",)
    assert surgery.verify(model, example_inputs=tokens)


def test_merges_come_out_one_by_one() -> None:
    model = transformed("lora rank 2 on attn as one\nlora rank 2 on attn.q + ffn as two", zoo.tiny("llama"))
    states = [bits(model)]
    surgery.merge(model, only=["one"], keep=True)
    states.append(bits(model))
    surgery.merge(model, keep=True)
    assert not same(bits(model), states[-1])
    for wanted in reversed(states):
        surgery.unmerge(model)
        assert same(bits(model), wanted)
    assert code(lambda: surgery.unmerge(model)) == "S379"


def test_what_has_changed_since_is_not_taken_out() -> None:
    """Nor what was not kept; nothing changes then."""
    program = "lora rank 2 on attn.q as french"
    model = transformed(program, zoo.tiny("gpt2"))
    surgery.merge(model)
    assert code(lambda: surgery.unmerge(model)) == "S379"
    for change in (
        lambda model: (
            next(p for n, p in model.named_parameters() if n.endswith("c_attn.weight")).data.view(-1)[-1:].add_(1)
        ),
        lambda model: model.double(),
        lambda model: surgery.apply(surgery.parse("lora rank 2 on attn.q"), model),
    ):
        model = transformed(program, zoo.tiny("gpt2"))
        surgery.merge(model, keep=True)
        change(model)
        tensors = bits(model)
        assert code(lambda model=model: surgery.unmerge(model)) == "S379"
        assert same(bits(model), tensors)


@pytest.mark.parametrize("program", ["lora rank 2 on attn.q", "ia3 on attn.k", "lora rank 2 on embed"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_has_changed_is_noticed_where_the_merge_changed_nothing(family: str, program: str) -> None:
    """An adapter that was not trained yet adds zero: its weights are the base's, and are looked at all the same."""
    model = surgery.apply(surgery.parse(program), zoo.tiny(family))
    base = bits(model)
    surgery.unmerge(surgery.merge(model, keep=True))
    assert same(bits(model), base)
    places = [path for path, _ in rewritten(model)]
    surgery.merge(model, keep=True)
    with torch.no_grad():
        next(model.get_submodule(places[-1]).parameters()).view(-1)[-1:].add_(1)
    tensors = bits(model)
    assert code(lambda: surgery.unmerge(model)) == "S379"
    assert same(bits(model), tensors)


def test_what_stays_attached_may_be_trained_before_a_merge_comes_out() -> None:
    model = surgery.apply(
        surgery.parse("lora rank 2 on attn.q as one\nlora rank 2 on attn.q as two"), zoo.tiny("llama")
    )
    surgery.merge(model, only=["one"], keep=True)
    for tensor in surgery.parameters(model).values():
        torch.nn.init.ones_(tensor)
    wanted = {name: tensor.clone() for name, tensor in surgery.parameters(model).items()}
    surgery.unmerge(model)
    assert wanted
    assert all(torch.equal(surgery.parameters(model)[name], tensor) for name, tensor in wanted.items())


def test_a_merged_model_is_saved_as_its_library_does(tmp_path: Path) -> None:
    """What is kept is in memory only; saving says so, and afterwards everything is still there to come out."""
    model = transformed("lora rank 2 on attn.q as french", zoo.tiny("gpt2"))
    tensors = bits(model)
    surgery.merge(model, keep=True)
    with pytest.raises(CheckpointError, match="unmerge"):
        surgery.save(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    again = type(model).from_pretrained(tmp_path / "theirs").eval()
    assert torch.equal(zoo.logits(again, zoo.inputs(model)), zoo.logits(model, zoo.inputs(model)))
    assert same(bits(surgery.unmerge(model)), tensors)


def test_modes_follow() -> None:
    model: Any = transformed("lora rank 2 dropout 50% on attn.q as french", zoo.tiny("gpt2"))
    surgery.merge(model, keep=True).train()
    surgery.unmerge(model)
    assert all(module.training for module in model.modules())
    with pytest.raises(GraphError, match="has: french"):
        surgery.merge(model, only=["german"])
