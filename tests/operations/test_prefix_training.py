"""Prefixes alone are trained, also checkpointed and under autocast; a merge folds the network behind them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from tests import studied, zoo


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


def test_autocast() -> None:
    """Promise: a float32 model with a prefix trains under autocast."""
    model, x = studied.apply("prefix 5", "llama", zoo.tiny("llama")), zoo.tokens(50, 2, 7)
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=x, labels=x).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in surgery.parameters(model).values())


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
