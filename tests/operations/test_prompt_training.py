"""Prompts alone are trained, as embeddings in front would be: checkpointed, compiled, and folded when merged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import surgery
from surgery.graph import soft
from tests import studied, zoo
from tests.reference_decoder import reference_decoder
from tests.texts import IDS, WAYS, in_front, transformed


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
