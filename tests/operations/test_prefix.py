"""Prefix tuning: a text as prefix is the text as prompt; a gated prefix is nothing at first; off is off."""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import surgery
from surgery.errors import SurgeryError
from tests import others, studied, zoo
from tests.reference_decoder import Shape, reference_decoder

TEXT = "w5 w9 w33 w12 w17"
IDS = torch.tensor([[5, 9, 33, 12, 17]])
BY_TEXT = f'prefix init text "{TEXT}"'


def ids_of(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


def transformed(program: str, model: Any, *example: Tensor) -> Any:
    return surgery.apply(surgery.parse(program), model, example_inputs=example or None, tokenizer=ids_of)


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
    plain, prompted = model(x), model(torch.cat((IDS.expand(3, -1), x), 1))[:, IDS.shape[1] :]
    got = transformed(BY_TEXT, model, x)(x)
    assert (got - prompted).abs().max() < 1e-10
    assert (plain - prompted).abs().max() > 0.1  # the text matters


@torch.no_grad()
def test_text_as_prefix_with_padding_on_the_left() -> None:
    """Promise: padding does not change what a row of a batch gives."""
    model = reference_decoder(Shape(attention="hand"))
    x = zoo.tokens(61, 2, 8)
    alone = model(torch.cat((IDS, x[:1, 3:]), 1))[0, IDS.shape[1] :]
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    got = transformed(BY_TEXT, model, x)(x, mask, positions)[0, 3:]
    assert (got - alone).abs().max() < 1e-10


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", zoo.CAUSAL)
def test_text_as_prefix_is_text_as_prompt_in_transformers(family: str, implementation: str) -> None:
    """Promise: soft equals hard, to 1e-5 of the largest logit in float32, in every causal family."""
    model = zoo.tiny(family, attn_implementation=implementation)
    x = zoo.tokens(50, 2, 7)
    plain = model(input_ids=x).logits
    prompted = model(input_ids=torch.cat((IDS.expand(2, -1), x), 1)).logits[:, IDS.shape[1] :]
    got = studied.apply(BY_TEXT, family, model, ids_of)(input_ids=x).logits
    assert (got - prompted).abs().max() < 1e-5 * prompted.abs().max()
    assert (plain - prompted).abs().max() > 1e-2 * prompted.abs().max()


GENERATIONS: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "none": {"use_cache": False},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "beams": {"num_beams": 3},
    "static-beams": {"num_beams": 3, "cache_implementation": "static", "disable_compile": True},
}


@pytest.mark.parametrize("how", GENERATIONS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_generate_token_for_token(family: str, how: str) -> None:
    """Promise: a padded batch generates what its rows generate when prompted with the text, whatever the cache."""
    model = zoo.tiny(family)
    model.generation_config.eos_token_id = None
    base = copy.deepcopy(model)
    x, mask = zoo.tokens(50, 3, 7), torch.ones(3, 7, dtype=torch.long)
    mask[0, :4] = 0
    mask[2, :1] = 0
    x = x * mask
    length, kind = {"max_new_tokens": 6, "do_sample": False}, GENERATIONS[how]
    got = studied.apply(BY_TEXT, family, model, ids_of).generate(x, attention_mask=mask, **length, **kind)[:, 7:]
    beams = {"num_beams": kind.get("num_beams", 1)}
    for row, seen, tokens in zip(x, mask.bool(), got, strict=True):
        prompt = torch.cat((IDS[0], row[seen]))[None]
        wanted = base.generate(prompt, attention_mask=torch.ones_like(prompt), **length, **beams)[0, prompt.shape[1] :]
        assert tokens.tolist() == wanted.tolist()


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
    model = studied.apply(BY_TEXT, family, model, ids_of)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    got = model(input_ids=x * mask, attention_mask=mask, position_ids=positions).logits[0, seen]
    prompted = base(input_ids=torch.cat((IDS, x[:1, seen]), 1)).logits[0, IDS.shape[1] :]
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
    text = torch.tensor([others.IDS]).expand(2, -1)
    prompted = base(input_ids=torch.cat((text, x), 1)).logits[:, text.shape[1] :]
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
        prompted = base(torch.cat((ids, x), 1)).logits[:, ids.shape[1] :]
        assert (model(x).logits - prompted).abs().max() < 1e-5 * prompted.abs().max()
    batch = read(lines, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    got = model.generate(**batch, max_new_tokens=8, do_sample=False)[:, -8:]
    for line, tokens in zip(lines, got, strict=True):
        prompt = torch.cat((ids, read(line, return_tensors="pt", add_special_tokens=False).input_ids), 1)
        wanted = base.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
        assert tokens.tolist() == wanted[0, -8:].tolist()


def test_text_is_repeated_or_cut_to_the_positions_asked_for() -> None:
    """Promise: `prefix 7 init text` of a text of five tokens is prompting with its first seven, repeated."""
    model, x = reference_decoder(), zoo.tokens(61, 1, 6)
    filled = torch.cat((IDS, IDS[:, :2]), 1)
    with torch.no_grad():
        prompted = model(torch.cat((filled, x), 1))[:, 7:]
        got = transformed(f'prefix 7 init text "{TEXT}"', model, x)(x)
    assert (got - prompted).abs().max() < 1e-10


@torch.no_grad()
@pytest.mark.parametrize("name", [*zoo.FAMILIES, *zoo.PLAIN])
def test_gated_is_nothing_at_first_and_something_later(name: str) -> None:
    """Promise: identity at the start, to the bit; and the gate opens."""
    specimen = zoo.specimen(name)
    before = specimen.logits()
    model = studied.apply("prefix 6 gated", name, specimen.model)
    assert torch.equal(specimen.logits(), before)
    for path, parameter in surgery.parameters(model).items():
        if path.endswith("prefix_gate"):
            parameter.fill_(0.5)
    assert not torch.allclose(specimen.logits(), before, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "base"),
    [
        pytest.param(name, base, marks=() if turn % 5 == 0 else pytest.mark.slow)
        for turn, (name, base) in enumerate(
            product([*zoo.FAMILIES, *zoo.PLAIN], ["quantize base nf4", "prune magnitude 50% on attn + ffn"])
        )
    ],
)
def test_gated_is_nothing_over_other_bases(name: str, base: str) -> None:
    """Promise: identity at the start, to the bit, over 4-bit and pruned weights, in training as in evaluation."""
    alone, gated = zoo.specimen(name, dtype=torch.float32), zoo.specimen(name, dtype=torch.float32)
    studied.apply(base, name, alone.model)
    studied.apply(f"{base}; prefix 6 gated", name, gated.model)
    for training in (False, True):
        found = []
        for specimen in (alone, gated):
            specimen.model.train(training)
            torch.manual_seed(0)  # dropout is there for both
            found.append(specimen.logits())
        assert torch.equal(*found)
    for path, parameter in surgery.parameters(gated.model).items():
        if path.endswith("prefix_gate"):
            parameter.fill_(0.5)
    assert not torch.allclose(gated.logits(), alone.logits(), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("program", ["prefix 6", "prefix 6 gated", "prefix 6 via mlp 8", BY_TEXT])
@pytest.mark.parametrize("name", [*zoo.FAMILIES, *zoo.PLAIN])
def test_off_means_off(name: str, program: str) -> None:
    """Promise: switched off, the base comes back to the bit, positions included; and the prefix, switched on again."""
    specimen = zoo.specimen(name)
    before = specimen.logits()
    model = studied.apply(program, name, specimen.model, ids_of)
    on = specimen.logits()
    assert torch.equal(on, before) == ("gated" in program)
    with surgery.disabled(model):
        assert torch.equal(specimen.logits(), before)
    assert torch.equal(specimen.logits(), on)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "nano", "byhand"])
def test_network_becomes_plain_keys_and_values(name: str) -> None:
    """Promise: a merge folds `via mlp`; the result is the same to the bit, and the network is gone."""
    specimen = zoo.specimen(name)
    model = studied.apply("prefix 4 via mlp 8", name, specimen.model)
    for parameter in surgery.parameters(model).values():
        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).to(parameter.dtype))
    before = specimen.logits()
    trunk = [p for n, p in model.named_parameters(remove_duplicate=False) if n.endswith("prefix_trunk_weight")]
    assert len(trunk) > 1
    assert len({id(each) for each in trunk}) == 1  # one trunk for all layers
    surgery.merge(model)
    assert torch.equal(specimen.logits(), before)
    assert {name.rpartition(".")[2] for name in surgery.parameters(model)} == {"prefix_key", "prefix_value"}


@pytest.mark.parametrize("gated", ["", " gated"])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_merged_prefixes_are_saved_loaded_verified_and_trained(name: str, gated: str, tmp_path: Path) -> None:
    """Promise: what a merge leaves is a `prefix` without `via`, to everything that follows."""
    specimen = zoo.specimen(name)
    base = specimen.logits()
    model = studied.apply(f"prefix 4 via mlp 8{gated}\nlora rank 2 on attn.q", name, specimen.model)
    with torch.no_grad():
        for path, parameter in surgery.parameters(model).items():
            parameter.add_(torch.randn(parameter.shape, generator=zoo.seeded(2, path)).to(parameter.dtype) * 0.1)
    assert surgery.verify(model)
    surgery.merge(model)
    on = specimen.logits()
    assert surgery.verify(model)
    surgery.save(model, tmp_path / "merged")
    again: Any = surgery.load(tmp_path / "merged")
    assert torch.equal(zoo.logits(again, specimen.inputs), on)
    assert surgery.verify(again)
    assert (tmp_path / "merged" / "surgery.json").read_text().count(" via mlp") == 0
    with surgery.disabled(again):
        assert not torch.equal(zoo.logits(again, specimen.inputs), on)
        assert (zoo.logits(again, specimen.inputs) - base).abs().max() > 0  # the merged lora stays in the weights
    assert isinstance(specimen.inputs, dict)
    for parameter in surgery.parameters(again).values():
        parameter.requires_grad_(True)
    again(**specimen.inputs).logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in surgery.parameters(again).values())


@pytest.mark.parametrize("program", ["prefix 5", "prefix 5 via mlp 8", "prefix 5 gated"])
@pytest.mark.parametrize("name", ["qwen2", "gpt2", "byhand"])
def test_only_the_prefix_is_trained(name: str, program: str) -> None:
    """Promise: gradients reach what was added, all of it once the gate is open, and nothing else."""
    specimen = zoo.specimen(name)
    model = studied.apply(program, name, specimen.model)
    added = surgery.parameters(model)
    for path, parameter in added.items():
        if path.endswith("prefix_gate"):
            parameter.data.fill_(0.5)
    output = model(**specimen.inputs).logits if isinstance(specimen.inputs, dict) else model(*specimen.inputs)
    output.square().sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(added)
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in added.values())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("program", ["prefix 5", "prefix 5 via mlp 8"])
def test_gradient_checkpointing_gives_the_same_gradients(program: str) -> None:
    """Peers fail here, since they hand the prefix over as a cache."""
    x = zoo.tokens(50, 2, 7)
    gradients = []
    for checkpointing in (False, True):
        model = studied.apply(program, "llama", zoo.tiny("llama")).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(input_ids=x, labels=x, use_cache=False).loss.backward()
        gradients.append({name: tensor.grad for name, tensor in surgery.parameters(model).items()})
    assert all(grad.any() for grad in gradients[0].values())
    assert studied.same_gradients(*gradients)


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


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_every_dtype(dtype: torch.dtype, implementation: str) -> None:
    """The prefix is kept in float32 over a 16-bit base, and the model's outputs keep the base's dtype."""
    model = zoo.tiny("llama", dtype=dtype, attn_implementation=implementation)
    x = zoo.tokens(50, 2, 7)
    prompted = model(input_ids=torch.cat((IDS.expand(2, -1), x), 1)).logits[:, IDS.shape[1] :]
    model = studied.apply(BY_TEXT, "llama", model, ids_of)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {parameter.dtype for parameter in surgery.parameters(model).values()} == {wide}
    got = model(input_ids=x).logits
    assert got.dtype == dtype
    assert (got - prompted).abs().max() <= 16 * torch.finfo(dtype).eps * prompted.abs().max()


def test_autocast() -> None:
    """Promise: a float32 model with a prefix trains under autocast."""
    model, x = studied.apply("prefix 5", "llama", zoo.tiny("llama")), zoo.tokens(50, 2, 7)
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=x, labels=x).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in surgery.parameters(model).values())


@torch.no_grad()
def test_two_prefixes_by_name() -> None:
    """Promise: each name is switched alone, and with both on the tokens stand behind both."""
    x = zoo.tokens(50, 2, 7)
    both = studied.apply("prefix 4 as a\nprefix 3 as b", "gpt2", zoo.tiny("gpt2"))
    together = both(input_ids=x).logits
    for name, program in {"a": "prefix 4 as a", "b": "prefix 3 as b"}.items():
        surgery.activate(both, name)
        alone = studied.apply(program, "gpt2", zoo.tiny("gpt2"))
        assert torch.equal(both(input_ids=x).logits, alone(input_ids=x).logits)
        assert not torch.equal(both(input_ids=x).logits, together)
    surgery.activate(both)
    assert torch.equal(both(input_ids=x).logits, together)


@torch.no_grad()
def test_beside_other_methods() -> None:
    """Peers can train one kind of method at a time; here statements meet in one attention, traced or not."""
    for name in ("llama", "byhand", "nano"):
        specimen = zoo.specimen(name)
        program = "prefix 4\nlora rank 2 on attn.q,v\nprune magnitude 50% on ffn\nquantize ffn nf4"
        base = zoo.specimen(name)
        studied.apply("prune magnitude 50% on ffn\nquantize ffn nf4", name, base.model)
        model = studied.apply(program, name, specimen.model)
        with surgery.disabled(model):
            assert torch.equal(specimen.logits(), base.logits())
        copied = copy.deepcopy(model)
        assert torch.equal(zoo.logits(copied, specimen.inputs), specimen.logits())


MISTAKES = {
    "prefix": "S",
    "prefix 0": "S",
    'prefix 4 via mlp 8 init text "w3"': "S",
    'prefix init text ""': "S",
    "prefix 4 via lstm": "S",
}


@pytest.mark.parametrize("program", MISTAKES)
def test_mistakes_are_refused_before_there_is_a_model(program: str) -> None:
    with pytest.raises(SurgeryError) as caught:
        surgery.parse(program)
    assert all(diagnostic.span is not None for diagnostic in caught.value.diagnostics)


def test_a_model_without_attention_is_told_so() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    with pytest.raises(SurgeryError, match=r"S20\d"):
        surgery.plan(surgery.parse("prefix 20 on all layers"), model, example_inputs=(torch.randn(2, 4),))


def test_no_room_in_a_table_of_positions() -> None:
    """A prefix as long as the table leaves no token a position; a shorter one is warned of."""
    model = zoo.tiny("gpt2")
    with pytest.raises(SurgeryError, match="S346"):
        surgery.plan(surgery.parse("prefix 64"), model)
    assert "44 tokens at most" in str(surgery.plan(surgery.parse("prefix 20"), model))


def test_a_text_needs_a_tokenizer() -> None:
    with pytest.raises(SurgeryError, match=r"S104|S347"):
        surgery.apply(surgery.parse('prefix init text "w3 w4"'), zoo.tiny("llama"))
