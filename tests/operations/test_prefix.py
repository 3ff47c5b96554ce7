"""Prefix tuning: a text as prefix is the text as prompt, whatever the padding, the cache, the search and the dtype."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import surgery
from tests import others, studied, zoo
from tests.reference_decoder import Shape, reference_decoder
from tests.texts import (
    IDS,
    MORE_GENERATIONS,
    TEXT,
    WAYS,
    assert_generates_as_prompted,
    ids_of,
    in_front,
    padded_rows,
    transformed,
)


def decoder_shapes() -> list[Any]:
    shapes = [
        Shape(positions=positions, attention=attention, fused=fused, bias=fused, gated=not fused, tied=fused)
        for positions in ("rotary", "learned")
        for attention in ("causal", "masked", "hand")
        for fused in (False, True)
    ]
    return [pytest.param(s, id=f"{s.positions}-{s.attention}-{'fused' if s.fused else 'apart'}") for s in shapes]


@torch.no_grad()
@pytest.mark.parametrize("shape", decoder_shapes())
def test_text_as_prefix_is_text_as_prompt_to_1e_10(shape: Shape) -> None:
    """Promise: soft equals hard at the start, proven in float64 where nothing casts."""
    model = reference_decoder(shape)
    x = zoo.tokens(shape.vocabulary, 3, 8)
    plain, prompted = model(x), model(in_front(x))[:, IDS.shape[1] :]
    got = transformed(WAYS["prefix"], model, x)(x)
    assert (got - prompted).abs().max() < 1e-10
    assert (plain - prompted).abs().max() > 0.1  # the text matters


@torch.no_grad()
def test_text_as_prefix_with_padding_on_the_left() -> None:
    """Promise: padding does not change what a row of a batch gives."""
    model = reference_decoder(Shape(attention="hand"))
    x = zoo.tokens(61, 2, 8)
    alone = model(in_front(x[:1, 3:]))[0, IDS.shape[1] :]
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    got = transformed(WAYS["prefix"], model, x)(x, mask, positions)[0, 3:]
    assert (got - alone).abs().max() < 1e-10


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", zoo.CAUSAL)
def test_text_as_prefix_is_text_as_prompt_in_transformers(family: str, implementation: str) -> None:
    """Promise: soft equals hard, to 1e-5 of the largest logit in float32, in every causal family."""
    model = zoo.tiny(family, attn_implementation=implementation)
    x = zoo.tokens(50, 2, 7)
    plain = model(input_ids=x).logits
    prompted = model(input_ids=in_front(x)).logits[:, IDS.shape[1] :]
    got = studied.apply(WAYS["prefix"], family, model, ids_of)(input_ids=x).logits
    assert (got - prompted).abs().max() < 1e-5 * prompted.abs().max()
    assert (plain - prompted).abs().max() > 1e-2 * prompted.abs().max()


@pytest.mark.parametrize("how", MORE_GENERATIONS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_generate_token_for_token(family: str, how: str) -> None:
    """Promise: a padded batch generates what its rows generate when prompted with the text, whatever the cache."""
    model = zoo.tiny(family)
    model.generation_config.eos_token_id = None
    base = copy.deepcopy(model)
    model = studied.apply(WAYS["prefix"], family, model, ids_of)
    assert_generates_as_prompted(model, base, *padded_rows(50), how, 6)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_padding_does_not_matter(family: str, side: str) -> None:
    """Promise: a row of a padded batch has the logits that it has when prompted alone, padded left or right."""
    model = zoo.tiny(family)
    base = copy.deepcopy(model)
    x, mask = zoo.tokens(50, 2, 9), torch.ones(2, 9, dtype=torch.long)
    seen = slice(4, 9) if side == "left" else slice(0, 5)
    mask[0] = 0
    mask[0, seen] = 1
    model = studied.apply(WAYS["prefix"], family, model, ids_of)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    got = model(input_ids=x * mask, attention_mask=mask, position_ids=positions).logits[0, seen]
    prompted = base(input_ids=in_front(x[:1, seen])).logits[0, IDS.shape[1] :]
    assert (got - prompted).abs().max() < 1e-5 * prompted.abs().max()


HEADS = ("qwen3", "gpt_bigcode", "deepseek_v2", "deepseek_v3")


@torch.no_grad()
@pytest.mark.parametrize("name", HEADS)
def test_other_geometries_of_heads(name: str) -> None:
    """Norms of queries and keys, one key-value head, latent attention whose keys (10) and values (7) differ in width.

    The prefix stands where the attention call has its keys: behind norms, rotations and the latents' expansion.
    """
    base, model = others.pair(f'prefix init text "{others.TEXT}"', name)
    x = zoo.tokens(60, 2, 7)
    prompted = base(input_ids=in_front(x)).logits[:, IDS.shape[1] :]
    assert (model(input_ids=x).logits - prompted).abs().max() < 1e-5 * prompted.abs().max()
    keys = {tuple(p.shape) for n, p in surgery.parameters(model).items() if n.endswith("prefix_key")}
    heads = others.anatomy(name).parts[0].heads or next(p.heads for p in others.anatomy(name).parts if p.heads)
    assert keys == {(heads.key_value, 5, heads.key_width)}
    _, through = others.pair("prefix 4 via mlp 6", name)
    on = through(input_ids=x).logits
    surgery.merge(through)
    assert torch.equal(through(input_ids=x).logits, on)
    _, gated = others.pair("prefix 4 gated", name)
    assert torch.equal(gated(input_ids=x).logits, base(input_ids=x).logits)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_every_dtype(dtype: torch.dtype, implementation: str) -> None:
    """The prefix is kept in float32 over a 16-bit base, and the model's outputs keep the base's dtype."""
    model = zoo.tiny("llama", dtype=dtype, attn_implementation=implementation)
    x = zoo.tokens(50, 2, 7)
    prompted = model(input_ids=in_front(x)).logits[:, IDS.shape[1] :]
    model = studied.apply(WAYS["prefix"], "llama", model, ids_of)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {parameter.dtype for parameter in surgery.parameters(model).values()} == {wide}
    got = model(input_ids=x).logits
    assert got.dtype == dtype
    assert (got - prompted).abs().max() <= 16 * torch.finfo(dtype).eps * prompted.abs().max()


def test_text_is_repeated_or_cut_to_the_positions_asked_for() -> None:
    """Promise: `prefix 7 init text` of a text of five tokens is prompting with its first seven, repeated."""
    model, x = reference_decoder(), zoo.tokens(61, 1, 6)
    filled = torch.cat((IDS, IDS[:, :2]), 1)
    with torch.no_grad():
        prompted = model(in_front(x, filled))[:, 7:]
        got = transformed(f'prefix 7 init text "{TEXT}"', model, x)(x)
    assert (got - prompted).abs().max() < 1e-10


@pytest.mark.slow
def test_text_as_prefix_on_a_real_decoder(smollm2: Any, smollm2_tokenizer: Any) -> None:
    """Promise: soft equals hard on SmolLM2, in forward to 1e-5 and token for token in padded, cached generation."""
    model, read = smollm2.float(), smollm2_tokenizer
    base = copy.deepcopy(model)
    text = "Translate the following English sentence to French:"
    ids = torch.tensor([read.encode(text, add_special_tokens=False)])
    lines = [" The weather is nice today.", " Hello"]
    x = read(lines[0], return_tensors="pt", add_special_tokens=False).input_ids
    model = surgery.apply(surgery.parse(f'prefix init text "{text}"'), model, tokenizer=read)
    with torch.no_grad():
        prompted = base(in_front(x, ids)).logits[:, ids.shape[1] :]
        assert (model(x).logits - prompted).abs().max() < 1e-5 * prompted.abs().max()
    batch = read(lines, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    got = model.generate(**batch, max_new_tokens=8, do_sample=False)[:, -8:]
    for line, tokens in zip(lines, got, strict=True):
        prompt = in_front(read(line, return_tensors="pt", add_special_tokens=False).input_ids, ids)
        wanted = base.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
        assert tokens.tolist() == wanted[0, -8:].tolist()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_same_prefix_as_peft(family: str) -> None:
    """With the same keys and values, what PEFT's prefix tuning gives, in a decoder and in an encoder."""
    peft = pytest.importorskip("peft")
    model = zoo.tiny(family)
    base = copy.deepcopy(model)
    config = peft.PrefixTuningConfig(
        num_virtual_tokens=6, task_type="CAUSAL_LM" if family == "llama" else "FEATURE_EXTRACTION"
    )
    theirs = peft.get_peft_model(base, config).eval()
    ours = studied.apply("prefix 6", family, model)
    sites = [m.surgery_attention for m in ours.modules() if hasattr(m, "surgery_attention")]
    heads, _, width = sites[0].prefix_key.shape
    table = theirs.prompt_encoder["default"].embedding.weight.view(6, 2 * len(sites), heads, width)
    for layer, site in enumerate(sites):
        site.prefix_key.copy_(table[:, 2 * layer].transpose(0, 1))
        site.prefix_value.copy_(table[:, 2 * layer + 1].transpose(0, 1))
    x = zoo.tokens(50, 2, 7)
    mask = torch.ones_like(x)
    assert torch.equal(ours(input_ids=x, attention_mask=mask).logits, theirs(input_ids=x, attention_mask=mask).logits)
