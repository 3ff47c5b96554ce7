"""Prompts: hard, soft and per layer, a text is that text in front; whatever the padding, the cache and the search."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import surgery
from surgery.errors import SurgeryError
from surgery.graph import soft
from tests import studied, zoo
from tests.reference_decoder import Shape, reference_decoder

TEXT = "w5 w9 w33 w12 w17"
IDS = torch.tensor([[5, 9, 33, 12, 17]])
WAYS = {
    "instruct": f'instruct "{TEXT}"',
    "cached": f'instruct "{TEXT}" cached',
    "prompt": f'prompt init text "{TEXT}"',
    "prefix": f'prefix init text "{TEXT}"',
}
SHAPES = [
    Shape(positions=positions, attention=attention, fused=attention == "masked", bias=attention == "hand")
    for positions in ("rotary", "learned")
    for attention in ("causal", "masked", "hand")
]


def ids_of(text: str) -> list[int]:
    return [int(word[1:]) if word[1:].isdigit() else 2 for word in text.split()]


def transformed(program: str, model: Any, *example: Tensor) -> Any:
    return surgery.apply(surgery.parse(program), model, example_inputs=example or None, tokenizer=ids_of)


def in_front(x: Tensor, ids: Tensor = IDS) -> Tensor:
    return torch.cat((ids.expand(len(x), -1), x), 1)


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


GENERATIONS: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "none": {"use_cache": False},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "beams": {"num_beams": 3},
    "static-beams": {"num_beams": 3, "cache_implementation": "static", "disable_compile": True},
}


@pytest.mark.parametrize("how", GENERATIONS)
@pytest.mark.parametrize(("family", "way"), [("llama", "prompt"), ("gpt2", "cached"), ("gpt_neox", "instruct")])
def test_generate_token_for_token(family: str, way: str, how: str) -> None:
    """Promise: a padded batch generates what its rows generate when prompted by hand, whatever the cache."""
    model = zoo.tiny(family)
    model.generation_config.eos_token_id = None
    base = copy.deepcopy(model)
    x, mask = zoo.tokens(50, 3, 7), torch.ones(3, 7, dtype=torch.long)
    mask[0, :4] = 0
    mask[2, :1] = 0
    x = x * mask
    length, kind = {"max_new_tokens": 6, "do_sample": False}, GENERATIONS[how]
    got = studied.apply(WAYS[way], family, model, ids_of).generate(x, attention_mask=mask, **length, **kind)[:, 7:]
    beams = {"num_beams": kind.get("num_beams", 1)}
    for row, seen, tokens in zip(x, mask.bool(), got, strict=True):
        prompt = torch.cat((IDS[0], row[seen]))[None]
        wanted = base.generate(prompt, attention_mask=torch.ones_like(prompt), **length, **beams)[0, prompt.shape[1] :]
        assert tokens.tolist() == wanted.tolist()


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


@torch.no_grad()
@pytest.mark.parametrize("via", ["mlp 5", "lstm 4"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "nano"])
def test_network_becomes_plain_vectors(name: str, via: str) -> None:
    """Promise: a merge folds the network; the result is the same to the bit, and the network is gone."""
    specimen = zoo.specimen(name)
    model = studied.apply(f"ptuning v1 4 via {via}", name, specimen.model)
    before, many = specimen.logits(), len(surgery.parameters(model))
    assert many > 4
    surgery.merge(model)
    assert torch.equal(specimen.logits(), before)
    assert [path.rpartition(".")[2] for path in surgery.parameters(model)] == ["ptuning"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert"])
def test_gradients_reach_the_prompt_and_nothing_else(family: str) -> None:
    """Promise: the loss of the tokens' labels trains the prompt alone; gradient checkpoints give the same gradients."""
    model, x = zoo.tiny(family), zoo.tokens(50, 2, 7)
    model = studied.apply("prompt 3", family, model).train()
    model(input_ids=x, labels=x).loss.backward()
    trained = {path for path, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == set(surgery.parameters(model))
    (prompt,) = surgery.parameters(model).values()
    kept = prompt.grad
    assert kept.abs().min() > 0
    prompt.grad = None
    model.activation_checkpointing_enable()
    model(input_ids=x, labels=x).loss.backward()
    assert (prompt.grad - kept).abs().max() < 1e-6 * kept.abs().max()


def test_gradients_are_those_of_prompting_by_hand() -> None:
    """Promise: the gradient of a prompt is that of embeddings in front, in float64."""
    model = reference_decoder()
    x = zoo.tokens(61, 3, 8)
    embeddings = model.embed.weight.detach()[IDS[0]].clone().requires_grad_()
    hook = model.embed.register_forward_hook(
        lambda module, args, out: torch.cat((embeddings.expand(3, -1, -1), out[:, 5:]), 1)
    )
    model(in_front(x))[:, 5:].square().sum().backward()
    hook.remove()
    model = transformed(WAYS["prompt"], model, x)
    (prompt,) = surgery.parameters(model).values()
    model(x).square().sum().backward()
    assert (prompt.grad - embeddings.grad).abs().max() < 1e-10 * embeddings.grad.abs().max()


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
@pytest.mark.parametrize("program", [WAYS["prompt"], f"prompt 2; {WAYS['instruct']}"])
def test_compiles_in_one_graph(program: str) -> None:
    """Promise: torch.compile(fullgraph=True) takes the model, and sees what is trained later."""
    for model, fed in ((zoo.tiny("llama"), {"use_cache": False}), (reference_decoder(), {})):
        x = zoo.tokens(50, 2, 7)
        model = transformed(program, model, *([] if fed else [x]))

        def call(model: Any, x: Tensor = x, fed: Any = fed) -> Tensor:
            out = model(x, **fed)
            return out if isinstance(out, Tensor) else out.logits

        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert (call(compiled) - call(model)).abs().max() < 1e-6
        next(iter(surgery.parameters(model).values()), torch.zeros(())).add_(1)
        assert (call(compiled) - call(model)).abs().max() < 1e-6


def test_checkpoints_of_plain_models_need_no_grad_through_the_prompt_again() -> None:
    """Promise: a layer of plain torch run under a checkpoint gives the gradients it gives without."""
    model, x = transformed("prompt 3", reference_decoder(), zoo.tokens(61, 2, 6)), zoo.tokens(61, 2, 6)
    (prompt,) = surgery.parameters(model).values()
    model(x).square().sum().backward()
    wanted, prompt.grad = prompt.grad, None
    reading = next(module for module in model.modules() if isinstance(module, soft.States)).reading
    for layer in model.layers:
        inner = layer.forward

        def run(*args: Any, inner: Any = inner) -> Tensor:
            return inner(*args) if reading.busy else checkpoint(inner, *args, use_reentrant=False)

        layer.forward = run
    model(x).square().sum().backward()
    assert (prompt.grad - wanted).abs().max() < 1e-12 * wanted.abs().max()


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
        prompted = base(torch.cat((ids, x), 1)).logits[:, ids.shape[1] :]
    wanted: dict[int, list[list[int]]] = {}
    for beams in (1, 2):
        prompts = [
            torch.cat((ids, read(line, return_tensors="pt", add_special_tokens=False).input_ids), 1) for line in lines
        ]
        wanted[beams] = [generated(base, {"input_ids": each}, beams)[0] for each in prompts]
    ways = (f'instruct "{text}" plain', f'instruct "{text}" plain cached', f'prompt init text "{text}"')
    for way in (*ways, f'prefix init text "{text}"'):
        model = surgery.apply(surgery.parse(way), copy.deepcopy(base), tokenizer=read)
        with torch.no_grad():
            assert (model(x).logits - prompted).abs().max() < 1e-5 * prompted.abs().max()
        for beams, tokens in wanted.items():
            assert generated(model, batch, beams) == tokens


def generated(model: Any, given: Any, beams: int) -> list[list[int]]:
    given = {"attention_mask": torch.ones_like(given["input_ids"]), **given}
    out: Tensor = model.generate(**given, max_new_tokens=5, min_new_tokens=5, do_sample=False, num_beams=beams)
    return [row.tolist() for row in out[:, -5:]]
