"""Prompts are switched off, copied, saved and put over other statements; what is no prompt is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import surgery
from surgery.errors import SurgeryError
from surgery.graph import soft
from tests import studied, zoo
from tests.reference_decoder import Shape, reference_decoder
from tests.texts import WAYS, ids_of, transformed

PROGRAMS = [WAYS["instruct"], WAYS["cached"], "prompt 3", "prompt 3 init normal", "ptuning v1 3 via mlp 5"]


@torch.no_grad()
@pytest.mark.parametrize("program", [*PROGRAMS, "ptuning v1 3 via lstm 4", "ptuning v2 3"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "nano", "byhand"])
def test_off_means_off(name: str, program: str) -> None:
    """Promise: switched off, the base comes back to the bit; and the prompt, switched on again."""
    if name in ("bert", "t5") and "cached" in program:
        return
    specimen = zoo.specimen(name)
    before = specimen.logits()
    model = studied.apply(program, name, specimen.model, ids_of)
    on = specimen.logits()
    assert on.shape == before.shape
    assert not torch.equal(on, before)
    with surgery.disabled(model):
        assert torch.equal(specimen.logits(), before)
    assert torch.equal(specimen.logits(), on)


def test_a_copy_has_a_prompt_of_its_own() -> None:
    """Promise: a deep copy, also after a training step, is independent of the model."""
    model, x = transformed("prompt 3", zoo.tiny("llama")), zoo.tokens(50, 2, 7)
    model(input_ids=x, labels=x).loss.backward()
    other = copy.deepcopy(model)
    with torch.no_grad():
        before = model(input_ids=x).logits
        next(iter(surgery.parameters(model).values())).add_(1)
        assert torch.equal(other(input_ids=x).logits, before)
        assert not torch.equal(model(input_ids=x).logits, before)


@torch.no_grad()
@pytest.mark.parametrize("program", [*PROGRAMS, "ptuning v1 3 via lstm 4; prompt 2", "prompt 2; lora rank 2 on attn.q"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_round_trip(family: str, program: str, tmp_path: Path) -> None:
    """Promise: saved and loaded, without a tokenizer, the model gives the same bits and trains the same tensors."""
    if family == "t5" and "cached" in program:
        return
    model = zoo.tiny(family)
    given = zoo.inputs(model)
    model = transformed(program, model)
    for parameter in surgery.parameters(model).values():
        parameter.add_(0.1)
    wanted = model(**given).logits
    surgery.save(model, tmp_path / "out")
    loaded = surgery.load(tmp_path / "out")
    assert torch.equal(loaded(**given).logits, wanted)
    assert surgery.parameters(loaded).keys() == surgery.parameters(model).keys()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_quantized_pruned_and_adapted_base_with_a_prefix(dtype: torch.dtype) -> None:
    """Promise: prompts stand behind prefixes and in front of texts, over whatever is underneath."""
    program = (
        'quantize base nf4; prune magnitude 50% on ffn; lora rank 2 on attn.q; prefix 2; prompt 3; instruct "w7 w8"'
    )
    model, x = zoo.tiny("llama", dtype=dtype, hidden_size=32, intermediate_size=64, head_dim=8), zoo.tokens(50, 2, 7)
    model = transformed(program, model)
    on = model(input_ids=x).logits
    words = model.get_input_embeddings().weight[[7, 8]]
    (prompt,) = (tensor for path, tensor in surgery.parameters(model).items() if path.endswith("surgery_prompt.prompt"))
    assert prompt.dtype == torch.float32
    rows = torch.cat((prompt.to(dtype), words)).expand(2, -1, -1)
    model.model._forward_pre_hooks.clear()  # the prompts by hand
    for states in (module for module in model.modules() if isinstance(module, soft.States)):
        states.reading = soft.Reading(waiting=frozenset([states.of]))
    for site in (module for module in model.modules() if getattr(module, "informed", ())):
        for _, amounts in site.informed:
            amounts.less = 5
    embedded = torch.cat((rows, model.get_input_embeddings()(x)), 1)
    by_hand = model(inputs_embeds=embedded).logits[:, 5:]
    bound = 1e-5 if dtype == torch.float32 else 3e-2
    assert (on - by_hand).abs().max() < bound * by_hand.abs().max()


def refused(program: str, model: Any, *example: Tensor, tokenizer: Any = ids_of) -> str:
    with pytest.raises(SurgeryError) as raised:
        surgery.plan(surgery.parse(program), model, example_inputs=example or None, tokenizer=tokenizer)
    return str(raised.value)


def test_bad_input() -> None:
    """Promise: one clear message with the way out, and the model is as it was."""
    model, x = reference_decoder(Shape(positions="learned", length=20)), zoo.tokens(61, 2, 5)
    before = model.state_dict().keys()
    assert "S348" in refused('prompt init text "  "', model, x)
    assert "S348" in refused('instruct "  "', model, x)
    assert "S347" in refused('instruct "w1"', model, x, tokenizer=None)
    assert "S346" in refused("prompt 20", model, x)
    assert "S346" in refused("ptuning v1 30 via mlp", model, x)
    assert "S111" in refused("prompt 3 in layers 0", model, x)
    assert "S103" in refused("prompt 3; prompt 4", model, x)
    assert "S101" in refused('instruct "w1" cached', zoo.tiny("bert"))
    assert "S346" in refused("prompt 64", zoo.tiny("llama", max_position_embeddings=64))
    assert model.state_dict().keys() == before


@pytest.mark.parametrize("text", ['prompt init text "w3 w61"', 'prefix init text "w61"', 'instruct "w99"'])
@pytest.mark.parametrize("name", ["plain", "llama"])
def test_a_foreign_tokenizer(name: str, text: str) -> None:
    """Promise: tokens that the model does not know are refused, and the model is as it was."""
    model = reference_decoder() if name == "plain" else zoo.tiny("llama", vocab_size=61)
    inputs = (zoo.tokens(61, 2, 5),) if name == "plain" else None
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(SurgeryError, match=r"S352.*the model knows 61"):
        surgery.apply(surgery.parse(text), model, example_inputs=inputs, tokenizer=ids_of)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
