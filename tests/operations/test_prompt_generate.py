"""What is generated behind a prompt, whatever the padding, the cache and the search; and how often it is read."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import surgery
from tests import studied, zoo
from tests.texts import MORE_GENERATIONS, WAYS, assert_generates_as_prompted, ids_of, in_front, padded_rows, transformed


@pytest.mark.parametrize("how", MORE_GENERATIONS)
@pytest.mark.parametrize(("family", "way"), [("llama", "prompt"), ("gpt2", "cached"), ("gpt_neox", "instruct")])
def test_generate_token_for_token(family: str, way: str, how: str) -> None:
    """Promise: a padded batch generates what its rows generate when prompted by hand, whatever the cache."""
    model = zoo.tiny(family)
    model.generation_config.eos_token_id = None
    base = copy.deepcopy(model)
    model = studied.apply(WAYS[way], family, model, ids_of)
    assert_generates_as_prompted(model, base, *padded_rows(50), how, 6)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_generate_of_an_encoder_decoder(stack: str) -> None:
    """Promise: with a cache and without one, with beams and padding, the same tokens; and the prompt matters."""
    model = zoo.tiny("t5", num_decoder_layers=2)  # as many as its encoder has: transformers' caches count these
    model.generation_config.eos_token_id = None
    x, mask = zoo.tokens(50, 2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[0, 5:] = 0
    length = {"max_new_tokens": 6, "do_sample": False}
    plain = model.generate(x, attention_mask=mask, **length)
    model = transformed(f"{WAYS['prompt']} in {stack}", model)
    for beams in (1, 3):
        cached = model.generate(x, attention_mask=mask, num_beams=beams, **length)
        assert torch.equal(cached, model.generate(x, attention_mask=mask, num_beams=beams, use_cache=False, **length))
        alone = model.generate(x[:1, :5], num_beams=beams, **length)
        assert cached[0].tolist() == alone[0].tolist()
    assert not torch.equal(plain, model.generate(x, attention_mask=mask, **length))


def test_decoding_reads_a_prompt_once() -> None:
    """Promise: later steps over a cache do not pay for the prompt again, unless a weight has changed."""
    model = studied.apply(WAYS["prompt"], "llama", zoo.tiny("llama"), ids_of)
    model.generation_config.eos_token_id = None
    passes: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: passes.append(args[0].shape[1]))
    x = zoo.tokens(50, 2, 7)
    model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=4, do_sample=False)
    assert passes == [5, 7, 1, 1, 1]
    passes.clear()
    with torch.no_grad():
        cache = model(input_ids=x, use_cache=True).past_key_values
        model(input_ids=x[:, :1], past_key_values=cache)
        next(iter(surgery.parameters(model).values())).add_(1)
        model(input_ids=x[:, :1], past_key_values=cache)
    assert passes == [5, 7, 1, 5, 1]


@torch.no_grad()
def test_cached_is_never_read_again() -> None:
    """Promise: the tokens of what is `cached` are never paid for again, and loading needs no tokenizer."""
    model = studied.apply(WAYS["cached"], "llama", zoo.tiny("llama"), ids_of)
    passes: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: passes.append(args[0].shape[1]))
    model(input_ids=zoo.tokens(50, 2, 7))
    assert passes == [7]


def generated(model: Any, given: Any, beams: int) -> list[list[int]]:
    given = {"attention_mask": torch.ones_like(given["input_ids"]), **given}
    out: Tensor = model.generate(**given, max_new_tokens=5, min_new_tokens=5, do_sample=False, num_beams=beams)
    return [row.tolist() for row in out[:, -5:]]


@pytest.mark.slow
def test_on_a_real_decoder(smollm2: Any, smollm2_tokenizer: Any) -> None:
    """Promise: on SmolLM2 all ways agree with the text by hand, in logits to 1e-5 and in what they generate."""
    base, read = smollm2.float(), smollm2_tokenizer
    text = "Translate the following English sentence to French:"
    ids = torch.tensor([read.encode(text, add_special_tokens=False)])
    lines = [" The weather is nice today.", " Hello"]
    x = read(lines[0], return_tensors="pt", add_special_tokens=False).input_ids
    batch = read(lines, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    with torch.no_grad():
        prompted = base(in_front(x, ids)).logits[:, ids.shape[1] :]
    wanted: dict[int, list[list[int]]] = {}
    for beams in (1, 2):
        prompts = [in_front(read(line, return_tensors="pt", add_special_tokens=False).input_ids, ids) for line in lines]
        wanted[beams] = [generated(base, {"input_ids": each}, beams)[0] for each in prompts]
    ways = (f'instruct "{text}" plain', f'instruct "{text}" plain cached', f'prompt init text "{text}"')
    for way in (*ways, f'prefix init text "{text}"'):
        model = surgery.apply(surgery.parse(way), copy.deepcopy(base), tokenizer=read)
        with torch.no_grad():
            assert (model(x).logits - prompted).abs().max() < 1e-5 * prompted.abs().max()
        for beams, tokens in wanted.items():
            assert generated(model, batch, beams) == tokens
