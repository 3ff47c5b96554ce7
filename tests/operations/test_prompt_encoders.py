"""Prompts of encoders and encoder-decoders, through the verbs: trained, switched, saved, loaded, merged, verified."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import surgery
from surgery.errors import PlanError
from tests import pretrained, studied, zoo

TEXT = "w7 w20 w33"


def out(model: Any, fed: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**fed)[0]
    return logits


def close(got: Tensor, want: Tensor, bound: float = 1e-5) -> bool:
    return got.shape == want.shape and bool((got - want).abs().max() <= bound * want.abs().max())


def hard(fed: dict[str, Tensor], words: tuple[int, ...]) -> dict[str, Tensor]:
    """The same texts, all without padding, beginning with these words."""
    front = torch.tensor([words]).expand(len(fed["input_ids"]), -1)
    ids = torch.cat([front, fed["input_ids"]], 1)
    return {**fed, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_a_text_in_front_is_its_words(name: str) -> None:
    """Soft equals hard, of each of two prompts and of both, one behind the other; off, the base to the bit."""
    model = zoo.tiny(name)
    fed = zoo.inputs(model)
    tokenizer = zoo.tokenizer(model.config.vocab_size)
    base = out(model, fed)
    n = 0 if name == "t5" else 2
    wants = [out(model, hard(fed, words))[:, n:] for words in ((7, 20), (33, 8), (7, 20, 33, 8))]
    program = 'prompt init text "w7 w20" as one; prompt init text "w33 w8" as two'
    studied.apply(program, name, model, tokenizer)
    both = out(model, fed)
    assert both.shape == base.shape
    assert close(both, wants[2][:, n:])
    for name_, want in (("one", wants[0]), ("two", wants[1])):
        surgery.activate(model, name_)
        assert close(out(model, fed), want)
    surgery.activate(model)
    assert torch.equal(out(model, fed), both)
    with surgery.disabled(model):
        assert torch.equal(out(model, fed), base)


@pytest.mark.parametrize(
    "program", ["prompt 5", "prompt 5 init normal", "ptuning v1 5 via mlp 7", "ptuning v1 4 via lstm 6"]
)
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_training_moves_the_rows_alone(name: str, program: str) -> None:
    model = zoo.tiny(name)
    before = {key: tensor.clone() for key, tensor in model.named_parameters()}
    studied.apply(program, name, model)
    fed = zoo.padded(model)
    trained = [tensor for tensor in model.parameters() if tensor.requires_grad]
    assert {id(each) for each in trained} == {id(each) for each in surgery.parameters(model).values()}
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    labels = torch.randint(3, 50, (2, 7 if name == "bert" else 5), generator=zoo.seeded(0, "labels"))
    losses = []
    model.train()
    for _ in range(8):
        optimizer.zero_grad()
        given = {key: value for key, value in fed.items() if key != "decoder_input_ids"}
        loss = model(**given, labels=labels).loss
        loss.backward()
        assert all(tensor.grad is not None for tensor in trained)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(torch.equal(dict(model.named_parameters())[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize(
    "program", ["prompt 5", "ptuning v1 5 via mlp 7", "prompt 3; lora rank 2 on attn.q,v; quantize ffn nf4"]
)
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_saved_and_loaded(name: str, program: str, tmp_path: Path) -> None:
    """The same bits, prompts in place; and so has a copy of the model, whose rows are its own."""
    model = zoo.tiny(name)
    studied.apply(program, name, model)
    with torch.no_grad():
        for tensor in surgery.parameters(model).values():
            tensor.add_(0.1)
    fed = zoo.padded(model)
    want = out(model, fed)
    surgery.save(model, tmp_path / "out")
    loaded = surgery.load(tmp_path / "out").eval()
    assert torch.equal(out(loaded, fed), want)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in surgery.parameters(copied).values():
            tensor.mul_(-1)
    assert torch.equal(out(model, fed), want)
    assert not close(out(copied, fed), want, 1e-3)


def test_merging_leaves_plain_rows() -> None:
    model = zoo.tiny("bert")
    studied.apply("ptuning v1 5 via mlp 7", "bert", model)
    fed = zoo.padded(model)
    want = out(model, fed)
    surgery.merge(model)
    assert close(out(model, fed), want)
    (rows,) = (tensor for key, tensor in model.state_dict().items() if "surgery_prompt" in key)
    assert rows.shape == (5, 21)


def test_generation_sees_the_rows() -> None:
    """Greedy and beam search of an encoder-decoder, padded, are those of the words."""
    model = zoo.tiny("t5", num_decoder_layers=2)
    fed = zoo.inputs(model)
    del fed["decoder_input_ids"]
    ways: list[dict[str, Any]] = [{}, {"num_beams": 3}]
    ways = [{"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **way} for way in ways]
    want = [model.generate(**hard(fed, (7, 20, 33)), **way) for way in ways]
    base = [model.generate(**fed, **way) for way in ways]
    tokenizer = zoo.tokenizer(model.config.vocab_size)
    surgery.apply(surgery.parse(f'prompt init text "{TEXT}"'), model, tokenizer=tokenizer)
    far = torch.zeros(2, 4, dtype=torch.long)
    padded = {key: torch.cat([far, value], 1) for key, value in fed.items()}
    for given in (fed, padded):
        got = [model.generate(**given, **way) for way in ways]
        assert all(torch.equal(one, two) for one, two in zip(got, want, strict=True))
    assert not all(torch.equal(one, two) for one, two in zip(want, base, strict=True))


def test_too_many_rows_for_the_positions() -> None:
    model = zoo.tiny("bert")
    with pytest.raises(PlanError, match="leave no room for tokens"):
        studied.apply("prompt 64", "bert", model)
    fed = zoo.inputs(model)
    assert torch.equal(out(model, fed), out(zoo.tiny("bert"), fed))


@pytest.mark.slow
def test_a_prompt_of_minilm(tmp_path: Path) -> None:
    """Trained, saved, loaded and verified; sentences' embeddings keep their shape, and the base comes back."""
    from transformers import AutoModel, AutoTokenizer

    folder = pretrained.minilm()
    model: Any = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    fed = dict(tokenizer(["a cat sat", "the quick brown fox jumps over it"], padding=True, return_tensors="pt"))
    base = out(model, fed)
    surgery.apply(surgery.parse("prompt 8 init vocab"), model)
    ((name, rows),) = surgery.parameters(model).items()
    assert rows.shape == (8, 384)
    assert any(torch.equal(rows[0], word) for word in model.embeddings.word_embeddings.weight)
    optimizer = torch.optim.AdamW([rows], lr=1e-2)
    goal = torch.nn.functional.normalize(torch.randn(2, 384, generator=zoo.seeded(0, "goal")))
    losses = []
    for _ in range(8):
        hidden, mask = model(**fed)[0], fed["attention_mask"][..., None]
        mean = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
        loss = 1 - (mean * goal).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    want = out(model, fed)
    assert want.shape == base.shape
    surgery.save(model, tmp_path / "out")
    loaded: Any = surgery.load(tmp_path / "out").eval()
    assert torch.equal(out(loaded, fed), want)
    assert torch.equal(surgery.parameters(loaded)[name], rows)
    assert surgery.verify(loaded)
    with surgery.disabled(loaded):
        assert torch.equal(out(loaded, fed), base)


@pytest.mark.slow
def test_a_text_in_front_of_minilm() -> None:
    from transformers import AutoModel, AutoTokenizer

    folder = pretrained.minilm()
    model: Any = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    fed = dict(tokenizer(["the film was long", "we liked it very"], return_tensors="pt"))
    text = "classify the sentiment:"
    words = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    want = out(
        model, {**hard(fed, words), "token_type_ids": torch.zeros(2, len(words) + fed["input_ids"].shape[1]).long()}
    )
    surgery.apply(surgery.parse(f'prompt init text "{text}"'), model, tokenizer=tokenizer)
    assert close(out(model, fed), want[:, len(words) :])
    report = surgery.verify(model, tokenizer=tokenizer)
    assert report
    assert [finding.status for finding in report.of("soft_equals_hard")] == ["holds"]


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_rows_beside_everything_else(name: str) -> None:
    """Over a lookup that is adapted too, attention with a prefix, pruned and 4-bit maps; also when these are merged."""
    model = zoo.tiny(name)
    program = "prompt 5; lora rank 2 on embed; prefix 3 on all layers; prune magnitude 50% on attn; quantize ffn nf4"
    studied.apply(program, name, model)
    with torch.no_grad():
        for tensor in surgery.parameters(model).values():
            tensor.add_(0.05)
    fed = zoo.padded(model)
    want = out(model, fed)
    surgery.merge(model)
    assert close(out(model, fed), want, 1e-4)
    studied_again = zoo.tiny(name)
    studied.apply(program.replace("prompt 5; ", ""), name, studied_again)
    assert not close(out(studied_again, fed), want, 1e-3)


@pytest.mark.parametrize("first", ["prompt 5", "lora rank 2 on attn.q,v + embed"])
def test_a_second_program(first: str) -> None:
    """Prompts before or after other methods: as if both had been one program, and hooks are not doubled."""
    second = {"prompt 5": "lora rank 2 on attn.q,v + embed"}.get(first, "prompt 5")
    one, two = zoo.tiny("bert"), zoo.tiny("bert")
    surgery.apply(surgery.parse(f"{first}\n{second}"), one)
    surgery.apply(surgery.parse(first), two)
    surgery.apply(surgery.parse(second), two)
    fed = zoo.padded(one)
    assert torch.equal(out(two, fed), out(one, fed))
    counts = [sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) for model in (one, two)]
    assert counts == [4, 4]


def test_compiles_and_exports() -> None:
    model = zoo.tiny("bert")
    studied.apply("prompt 5; lora rank 2 on attn.q", "bert", model)
    fed = zoo.padded(model)
    want = out(model, fed)
    exported = torch.export.export(model, (), fed, strict=False).module()
    assert close(out(exported, fed), want)
    assert close(out(torch.compile(model, fullgraph=True, backend="eager"), fed), want)
    torch._dynamo.reset()
