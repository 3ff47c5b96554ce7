"""Prefixes in encoder-decoders: on the encoder, the decoder and on cross-attention, whose positions are others."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import surgery
from tests import others, zoo
from tests.texts import GENERATIONS, IDS, in_front

PROGRAMS = {
    "cross": "prefix 4 on cross",
    "both": "prefix 5 on all layers\nprefix 4 on cross",
}


def states(model: Any, count: int) -> Tensor:
    """Encoder states that no token has."""
    width = model.config.d_model
    return torch.randn(1, count, width, generator=zoo.seeded(0, "states"))


@torch.no_grad()
def as_encoder_states(model: Any, name: str, extra: Tensor) -> None:
    """Let each cross-attention's prefix be the keys and values of these encoder states."""
    crosses = [p for p in others.anatomy(name).parts if p.kind == "attention" and p.role == "cross"]
    for part in crosses:
        module = model.get_submodule(part.path)
        project = (module.k, module.v) if hasattr(module, "k") else (module.k_proj, module.v_proj)
        child = module.surgery_attention
        for each, tensor in zip(project, (child.prefix_key, child.prefix_value), strict=True):
            tensor.copy_(each(extra[0]).view(extra.shape[1], part.heads.query, -1).transpose(0, 1))


def with_states(base: Any, fed: dict[str, Tensor], extra: Tensor) -> dict[str, Any]:
    """Arguments of the base that reads the extra encoder states in front of its own."""
    from transformers.modeling_outputs import BaseModelOutput

    mask = fed["attention_mask"]
    own = base.get_encoder()(input_ids=fed["input_ids"], attention_mask=mask).last_hidden_state
    seen = torch.ones(len(mask), extra.shape[1], dtype=mask.dtype)
    both = BaseModelOutput(last_hidden_state=torch.cat((extra.expand(len(own), -1, -1), own), 1))
    return {"encoder_outputs": both, "attention_mask": torch.cat((seen, mask), 1)}


@torch.no_grad()
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", others.PAIRED)
def test_prefix_on_cross_is_more_encoder_states(name: str, padding: str) -> None:
    """Keys and values of four vectors as prefix on cross-attention are those vectors in front of the encoder's states.

    Nothing else moves: the decoder's positions are its own, and the encoder does not know.
    """
    base, model = others.pair("prefix 4 on cross", name)
    extra = states(base, 4)
    as_encoder_states(model, name, extra)
    fed = others.inputs(base)
    if padding != "none":
        fed["attention_mask"][0, slice(0, 3) if padding == "left" else slice(4, 7)] = 0
    wanted = base(**with_states(base, fed, extra), decoder_input_ids=fed["decoder_input_ids"]).logits
    for use_cache in (True, False):
        got = model(**fed, use_cache=use_cache).logits
        assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert (base(**fed).logits - wanted).abs().max() > 1e-3 * wanted.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("how", GENERATIONS)
@pytest.mark.parametrize("name", others.PAIRED)
def test_generate_with_a_prefix_on_cross(name: str, how: str) -> None:
    """Promise: cross-attention's cache, which is filled once, does not hold the prefix, and always has it in front."""
    base, model = others.pair("prefix 4 on cross", name)
    extra = states(base, 4)
    as_encoder_states(model, name, extra)
    fed = others.inputs(base)
    fed.pop("decoder_input_ids")
    fed["attention_mask"][0, :3] = 0
    length, kind = {"max_new_tokens": 6, "do_sample": False}, GENERATIONS[how]
    got = model.generate(**fed, **length, **kind)
    plain = {"num_beams": kind.get("num_beams", 1)}
    assert got.tolist() == base.generate(**with_states(base, fed, extra), **length, **plain).tolist()


@torch.no_grad()
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("name", others.PAIRED)
def test_alone_and_together_and_off(name: str, program: str, tmp_path: Path) -> None:
    """Promise: off means off to the bit, merged and reloaded the same bits, on cross alone and with all layers."""
    base, model = others.pair(PROGRAMS[program].replace("prefix 4", "prefix 4 via mlp 6"), name)
    fed = others.inputs(base)
    on = model(**fed).logits
    places = {path.rpartition(".surgery_attention")[0] for path in surgery.parameters(model)}
    attention = [p for p in others.anatomy(name).parts if p.kind == "attention"]
    wanted = {p.path for p in attention if program == "both" or p.role == "cross"}
    assert {place for place in places if place} >= wanted - {next(iter(sorted(wanted)))}
    with surgery.disabled(model):
        assert torch.equal(model(**fed).logits, base(**fed).logits)
    surgery.merge(model)
    assert torch.equal(model(**fed).logits, on)
    surgery.save(model, tmp_path / "saved")
    assert torch.equal(surgery.load(tmp_path / "saved")(**fed).logits, on)
    assert torch.equal(copy.deepcopy(model)(**fed).logits, on)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_both_together_are_each_alone_in_their_place(name: str) -> None:
    """Keys of cross-attention take nothing from those of self-attention: only the latter shift positions."""
    _, model = others.pair(PROGRAMS["both"].replace("cross", "cross as aside"), name)
    fed = others.inputs(model)
    together = model(**fed).logits
    for wanted, program in {"default": "prefix 5 on all layers", "aside": "prefix 4 on cross as aside"}.items():
        surgery.activate(model, wanted)
        _, alone = others.pair(program, name)
        assert torch.equal(model(**fed).logits, alone(**fed).logits)
    surgery.activate(model)
    assert torch.equal(model(**fed).logits, together)


@torch.no_grad()
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", ["t5", "umt5", "bart"])
def test_text_stands_in_front_of_the_encoders_tokens(name: str, padding: str) -> None:
    """In one layer a text's keys depend on nothing else: a prefix is the text in front, as far from each token.

    So the relative positions of T5 go on in front of its tokens, padding not counted.
    """
    depth = {"num_layers": 1} if "t5" in name else {"encoder_layers": 1}
    base = others.tiny(name, **depth)
    model = copy.deepcopy(base)
    program = surgery.parse(f'prefix init text "{others.TEXT}" in encoder')
    surgery.apply(program, model, tokenizer=others.ids_of)
    x, mask = zoo.tokens(60, 2, 9), torch.ones(2, 9, dtype=torch.long)
    seen = {"none": slice(0, 9), "left": slice(4, 9), "right": slice(0, 5)}[padding]
    mask[0] = 0
    mask[0, seen] = 1
    got = model.get_encoder()(input_ids=x, attention_mask=mask).last_hidden_state
    for row, kept in enumerate((seen, slice(0, 9))):
        text = in_front(x[row : row + 1, kept])
        wanted = base.get_encoder()(input_ids=text).last_hidden_state[0, IDS.shape[1] :]
        if name == "bart" and padding == "left":
            continue  # BART's encoder counts positions from the first place, padding or not
        assert (got[row, kept] - wanted).abs().max() < 1e-5 * wanted.abs().max()
        plain = base.get_encoder()(input_ids=x[row : row + 1, kept]).last_hidden_state[0]
        assert (plain - wanted).abs().max() > 1e-3 * wanted.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("how", GENERATIONS)
@pytest.mark.parametrize("name", ["t5", "umt5"])
def test_text_stands_in_front_of_the_decoders_tokens(name: str, how: str) -> None:
    """Token for token: a text as prefix on T5's decoder is the text as its first tokens, whatever the cache."""
    base = others.tiny(name, num_layers=1, num_decoder_layers=1)
    model = copy.deepcopy(base)
    text = (0, *others.IDS)  # `generate` wants the start token first
    program = surgery.parse(f'prefix init text "{" ".join(map(str, text))}" in decoder')
    surgery.apply(program, model, tokenizer=others.ids_of)
    x = zoo.tokens(60, 2, 6)
    start = zoo.tokens(60, 2, 3, seed=4)
    start[:, 0] = 0
    prompt = in_front(start, torch.tensor([text]))
    wanted = base(input_ids=x, decoder_input_ids=prompt).logits[:, len(text) :]
    got = model(input_ids=x, decoder_input_ids=start).logits
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()
    length, kind = {"max_new_tokens": 6, "do_sample": False}, GENERATIONS[how]
    tokens = model.generate(x, decoder_input_ids=start, **length, **kind)[:, 3:]
    beams = {"num_beams": kind.get("num_beams", 1)}
    assert (
        tokens.tolist() == base.generate(x, decoder_input_ids=prompt, **length, **beams)[:, prompt.shape[1] :].tolist()
    )


@pytest.mark.parametrize("name", others.PAIRED)
def test_gradients_reach_all_of_both(name: str) -> None:
    """Promise: with prefixes on all layers and on cross-attention, all of them are trained and nothing else is."""
    _, model = others.pair(PROGRAMS["both"], name)
    fed = others.inputs(model)
    fed.pop("decoder_input_ids")
    model(**fed, labels=fed["input_ids"]).loss.backward()
    added = surgery.parameters(model)
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(added)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in added.values())
