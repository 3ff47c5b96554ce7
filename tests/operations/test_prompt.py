"""Prompts: hard, soft and per layer, a text is that text in front, in every stack and behind every window."""

from __future__ import annotations

import copy

import pytest
import torch

import surgery
from tests import studied, zoo
from tests.reference_decoder import Shape, reference_decoder
from tests.texts import IDS, TEXT, WAYS, ids_of, in_front, transformed

SHAPES = [
    Shape(positions=positions, attention=attention, fused=attention == "masked", bias=attention == "hand")
    for positions in ("rotary", "learned")
    for attention in ("causal", "masked", "hand")
]


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.positions}-{s.attention}")
def test_every_way_is_the_text_by_hand_to_1e_10(shape: Shape, way: str) -> None:
    """Promise: soft equals hard, in float64 where nothing casts."""
    model = reference_decoder(shape)
    x = zoo.tokens(shape.vocabulary, 3, 8)
    plain, prompted = model(x), model(in_front(x))[:, IDS.shape[1] :]
    assert (transformed(WAYS[way], model, x)(x) - prompted).abs().max() < 1e-10
    assert (plain - prompted).abs().max() > 0.1  # the text matters


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma", "opt"])
def test_every_way_is_the_text_by_hand_in_transformers(family: str, way: str) -> None:
    """Promise: soft equals hard, to 1e-5 of the largest logit in float32."""
    model, x = zoo.tiny(family), zoo.tokens(50, 2, 7)
    prompted = model(input_ids=in_front(x)).logits[:, IDS.shape[1] :]
    got = studied.apply(WAYS[way], family, model, ids_of)(input_ids=x).logits
    assert (got - prompted).abs().max() < 1e-5 * prompted.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("way", ["instruct", "prompt"])
@pytest.mark.parametrize("family", ["bert", "t5"])
def test_an_encoder_reads_the_text_in_front_of_its_tokens(family: str, way: str) -> None:
    """Promise: in an encoder too, rows are what the text's tokens are; the output is that of the tokens."""
    model, x = zoo.tiny(family), zoo.tokens(50, 2, 7)
    beside = {"decoder_input_ids": x[:, :4]} if family == "t5" else {}
    prompted = model(input_ids=in_front(x), **beside).logits
    if family == "bert":
        prompted = prompted[:, IDS.shape[1] :]
    got = studied.apply(WAYS[way], family, model, ids_of)(input_ids=x, **beside).logits
    assert got.shape == prompted.shape
    assert (got - prompted).abs().max() < 1e-5 * prompted.abs().max()


@torch.no_grad()
def test_a_decoder_takes_a_prompt_when_asked() -> None:
    """Promise: `in decoder` puts it in front of the decoder's tokens, where it reads the encoder too."""
    model, x = zoo.tiny("t5"), zoo.tokens(50, 2, 7)
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    given = {"input_ids": x, "attention_mask": mask}
    prompted = model(**given, decoder_input_ids=in_front(x)).logits[:, IDS.shape[1] :]
    plain = model(**given, decoder_input_ids=x).logits
    model = studied.apply(f"{WAYS['prompt']} in decoder", "t5", model, ids_of)
    got = model(**given, decoder_input_ids=x).logits
    assert (got - prompted).abs().max() < 1e-5 * prompted.abs().max()
    assert (plain - prompted).abs().max() > 1e-2 * prompted.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("way", ["instruct", "prompt"])
def test_padding_on_either_side_changes_nothing(way: str) -> None:
    """Promise: a row of a padded batch gives what it gives alone."""
    for family in ("llama", "gpt2"):
        model, x = zoo.tiny(family), zoo.tokens(50, 2, 7)
        model = studied.apply(WAYS[way], family, model, ids_of)
        alone = model(input_ids=x[:1, 3:]).logits[0]
        left, right = torch.ones_like(x), torch.ones_like(x)
        left[0, :3] = 0
        right[0, 4:] = 0
        positions = (left.cumsum(-1) - 1).clamp(min=0)
        got = model(input_ids=x, attention_mask=left, position_ids=positions).logits[0, 3:]
        assert (got - alone).abs().max() < 1e-5 * alone.abs().max()
        turned = torch.cat((x[:, 3:], x[:, :3]), 1)
        got = model(input_ids=turned, attention_mask=right).logits[0, :4]
        assert (got - alone).abs().max() < 1e-5 * alone.abs().max()


@torch.no_grad()
def test_text_is_repeated_or_cut() -> None:
    """Promise: `prompt 7 init text` of five tokens is prompting with the first seven of them, repeated."""
    model, x = reference_decoder(), zoo.tokens(61, 1, 6)
    for n in (7, 3):
        filled = torch.cat((IDS, IDS), 1)[:, :n]
        prompted = model(in_front(x, filled))[:, n:]
        got = transformed(f'prompt {n} init text "{TEXT}"', copy.deepcopy(model), x)(x)
        assert (got - prompted).abs().max() < 1e-10


@torch.no_grad()
def test_init_vocab_takes_words_of_the_vocabulary() -> None:
    """Promise: `init vocab`, the default, starts from embeddings of different words, chosen by the program's seed."""
    drawn = []
    for seed in (0, 0, 1):
        model = reference_decoder()
        x = zoo.tokens(61, 2, 5)
        program = surgery.parse("prompt 7 init vocab")
        surgery.apply(type(program)(program.statements, program.source, seed), model, example_inputs=(x,))
        (prompt,) = surgery.parameters(model).values()
        rows = [(model.embed.weight == row).all(-1).nonzero().item() for row in prompt]
        assert len(set(rows)) == 7
        drawn.append(rows)
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_two_prompts_with_names() -> None:
    """Promise: named prompts stand one behind the other, and each is switched by its name."""
    model, x = reference_decoder(), zoo.tokens(61, 2, 6)
    wanted = {
        ("a",): model(in_front(x, torch.tensor([[3, 4]])))[:, 2:],
        ("b",): model(in_front(x, torch.tensor([[5]])))[:, 1:],
        ("a", "b"): model(in_front(x, torch.tensor([[3, 4, 5]])))[:, 3:],
    }
    model = transformed('prompt init text "w3 w4" as a; prompt init text "w5" as b', model, x)
    for names, logits in wanted.items():
        surgery.activate(model, *names)
        assert (model(x) - logits).abs().max() < 1e-10


@torch.no_grad()
@pytest.mark.parametrize("window", [3, 4, 6])
@pytest.mark.parametrize(
    "program",
    [
        'prompt init text "w12 w17"\ninstruct "w5 w9 w33" cached',
        'prompt init text "w12 w17" as b\nprompt init text "w5 w9 w33" as a',
        'prefix init text "w5 w9 w33" on all layers\ninstruct "w12 w17"',
    ],
)
def test_several_behind_a_window_are_their_texts_by_hand(program: str, window: int) -> None:
    """Promise: a window leaves the furthest text behind first, whatever method brings it."""
    model = zoo.tiny("qwen2", dtype=torch.float64, use_sliding_window=True, sliding_window=window, max_window_layers=0)
    x = zoo.tokens(50, 2, 7)
    prompted = model(input_ids=in_front(x)).logits[:, IDS.shape[1] :]
    got = studied.apply(program, "qwen2", model, ids_of)(input_ids=x).logits
    assert (got - prompted).abs().max() < 1e-6 * prompted.abs().max()  # norms cast to float32
