"""A transformed transformers model is still one: copied, compiled, checkpointed, cast, generated from, saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import surgery
from tests import zoo

PROGRAM = "lora rank 3 on attn.q,v + ffn.down; prune magnitude 50% on ffn; prefix 4 on all layers"
DECODERS = ["llama", "qwen2", "gemma", "phi3", "gpt2", "gpt_neox", "opt"]


def transformed(family: str, program: str = PROGRAM, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A small model under a program, every trained tensor random."""
    model = surgery.apply(surgery.parse(program), zoo.tiny(family, dtype=dtype, **changes))
    randomise(model)
    return model


@torch.no_grad()
def randomise(model: Any, seed: int = 0) -> None:
    for name, parameter in surgery.parameters(model).items():
        draw = torch.randn(parameter.shape, generator=zoo.seeded(seed, name), dtype=torch.float64)
        parameter.copy_(draw * (parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0))


def gradients(model: Any, fed: zoo.Inputs) -> dict[str, Tensor]:
    """Of the mean square of the logits, for every parameter that gets one."""
    model.zero_grad()
    model(**fed, use_cache=False).logits.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_the_class_and_the_base_keys_stay(family: str) -> None:
    before = zoo.tiny(family)
    keys, kind = set(before.state_dict()), type(before)
    model = transformed(family)
    assert type(model) is kind
    assert keys <= set(model.state_dict()), "a key of the base is gone"
    added = {name for name in model.state_dict() if name not in keys}
    assert set(surgery.parameters(model)) <= added


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_a_deep_copy_is_equal_and_independent(family: str) -> None:
    model = transformed(family)
    fed = zoo.inputs(model)
    copied = copy.deepcopy(model)
    wanted = zoo.logits(model, fed)
    assert torch.equal(zoo.logits(copied, fed), wanted)
    randomise(copied, seed=1)
    assert not torch.equal(zoo.logits(copied, fed), wanted)
    assert torch.equal(zoo.logits(model, fed), wanted)
    with surgery.disabled(copied):
        off = zoo.logits(copied, fed)
    with surgery.disabled(model):
        assert torch.equal(off, zoo.logits(model, fed))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_gradient_checkpointing_changes_no_gradient(family: str) -> None:
    model = transformed(family).train()
    fed = zoo.inputs(model)
    plain = gradients(model, fed)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed = gradients(model, fed)
    assert plain.keys() == checkpointed.keys() == set(surgery.parameters(model))
    assert all(gradient.abs().max() > 0 for gradient in plain.values())
    for name, gradient in plain.items():
        # T5 shares its position bias between layers: the sum over them is taken in another order.
        slack = 1e-5 * gradient.abs().max() if family == "t5" else 0.0
        assert (checkpointed[name] - gradient).abs().max() <= slack, name


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_it_compiles_as_one_graph(family: str) -> None:
    model = transformed(family)
    fed = zoo.inputs(model)
    wanted = zoo.logits(model, fed)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(zoo.logits(compiled, fed), wanted, atol=1e-5 * wanted.abs().max().item())
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "bert", "t5"])
def test_every_dtype_runs_and_trains(family: str, dtype: torch.dtype) -> None:
    model = transformed(family, dtype=dtype)
    fed = zoo.inputs(model)
    logits = zoo.logits(model, fed)
    assert logits.dtype == dtype
    assert logits.isfinite().all()
    exact = zoo.logits(transformed(family, dtype=torch.float64), fed)
    # Rounding may turn a close race of the mask's threshold: what is compared is far coarser than one weight.
    coarse = {torch.float16: 0.1, torch.bfloat16: 0.3, torch.float32: 1e-3, torch.float64: 1e-12}
    assert ((logits - exact).abs().max() / exact.abs().max()).item() <= coarse[dtype]
    model.train()
    loss = model(**fed).logits.float().square().mean()
    loss.backward()
    for name, parameter in surgery.parameters(model).items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_autocast_runs_and_trains(family: str) -> None:
    model = transformed(family).train()
    fed = zoo.inputs(model)
    wanted = zoo.logits(model, fed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(**fed).logits
    logits.float().square().mean().backward()
    assert ((logits.float() - wanted).abs().max() / wanted.abs().max()).item() < 0.2
    for name, parameter in surgery.parameters(model).items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("family", DECODERS)
def test_greedy_tokens_are_the_same_with_and_without_a_cache(family: str) -> None:
    model = transformed(family)
    ids = zoo.tokens(model.config.vocab_size, 2, 5)
    fed = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    more = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cached = model.generate(**fed, **more, use_cache=True)
    assert cached.shape == (2, 11)
    assert torch.equal(cached, model.generate(**fed, **more, use_cache=False))
    with surgery.disabled(model):
        assert not torch.equal(cached, model.generate(**fed, **more)), "the program had no effect on the tokens"


@pytest.mark.parametrize("family", DECODERS)
def test_padding_on_the_left_changes_no_token(family: str) -> None:
    model = transformed(family)
    ids = zoo.tokens(model.config.vocab_size, 1, 5)
    more = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    alone = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **more)[:, 5:]
    other = zoo.tokens(model.config.vocab_size, 1, 8, seed=3)
    padding = torch.full((1, 3), model.config.pad_token_id or 0)
    batch = torch.cat((torch.cat((padding, ids), dim=1), other))
    mask = torch.ones_like(batch)
    mask[0, :3] = 0
    assert torch.equal(model.generate(input_ids=batch, attention_mask=mask, **more)[:1, 8:], alone)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_save_pretrained_keeps_every_tensor(family: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = transformed(family)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    for name, tensor in surgery.parameters(model).items():
        assert torch.equal(saved[name], tensor), name
    plain = type(model).from_pretrained(tmp_path)
    with surgery.disabled(model):
        assert torch.equal(zoo.logits(plain, zoo.inputs(model)), zoo.logits(model, zoo.inputs(model)))


def test_a_transformed_model_trains_with_an_optimizer() -> None:
    model = transformed("llama").train()
    fed = zoo.inputs(model)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if n not in surgery.parameters(model)}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(**fed, labels=fed["input_ids"]).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
