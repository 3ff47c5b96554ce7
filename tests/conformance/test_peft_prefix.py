"""PEFT's prefix tuning with the same parameters, with and without projection: the same logits to 1e-6."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from tests import others, zoo

peft = pytest.importorskip("peft")
N = 6
FAMILIES = ("llama", "qwen2", "gpt2", "opt", "gpt_neox", "bert", "t5", "bart")


def built(family: str) -> Any:
    """A model whose decoder is as deep as its encoder: PEFT counts layers once for both."""
    if family not in others.PAIRED:
        return zoo.tiny(family)
    return others.tiny(family, **({"d_model": 20} if family == "t5" else {}))  # PEFT takes its heads to fill the width


def theirs(base: Any, projected: bool) -> Any:
    task = {True: "SEQ_2_SEQ_LM", False: "CAUSAL_LM"}[bool(base.config.is_encoder_decoder)]
    task = "FEATURE_EXTRACTION" if base.config.model_type == "bert" else task
    config = peft.PrefixTuningConfig(
        num_virtual_tokens=N, task_type=task, prefix_projection=projected, encoder_hidden_size=9
    )
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    for name, parameter in model.prompt_encoder.named_parameters():
        draw = torch.randn(parameter.shape, generator=zoo.seeded(3, name), dtype=torch.float64)
        parameter.data.copy_(draw * (0.5 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5))
    return model


def sites(model: Any) -> list[Any]:
    """What our program rewrote, in the order of layers."""
    return [module.surgery_attention for module in model.modules() if hasattr(module, "surgery_attention")]


def by_layer(rows: Tensor, model: Any) -> list[Tensor]:
    """For each layer (key and value, heads, width, ...), of what PEFT keeps side by side.

    In an encoder-decoder PEFT repeats its table and cuts it in fours, of which the first two are for self-attention: so
    layer i has what was made for layer 2i, and every other layer's share is never used.
    """
    layers, heads = len(sites(model)), model.surgery_heads
    cut = rows.reshape(layers, 2, heads, -1, *rows.shape[1:])
    step = 2 if model.config.is_encoder_decoder else 1
    return [cut[(step * layer) % layers] for layer in range(layers)]


@torch.no_grad()
def fill(model: Any, encoder: Any) -> None:
    """Our tensors from PEFT's; where heads share keys its embedding is narrower, and what is left of ours is zero."""
    ours, table = sites(model), encoder.embedding.weight
    if hasattr(ours[0], "prefix_key"):
        for site, (key, value) in zip(ours, by_layer(table.t(), model), strict=True):
            site.prefix_key.copy_(key.transpose(1, 2))
            site.prefix_value.copy_(value.transpose(1, 2))
        return
    first, last = encoder.transform[0], encoder.transform[2]
    narrow = table.shape[1]
    ours[0].prefix_embedding.zero_()[:, :narrow].copy_(table)
    ours[0].prefix_trunk_weight.zero_()[:, :narrow].copy_(first.weight)
    ours[0].prefix_trunk_bias.copy_(first.bias)
    weights, biases = by_layer(last.weight, model), by_layer(last.bias, model)
    for site, weight, bias in zip(ours, weights, biases, strict=True):
        site.prefix_mlp_weight.copy_(weight.transpose(0, 1).reshape(site.prefix_mlp_weight.shape))
        site.prefix_mlp_bias.copy_(bias.transpose(0, 1).reshape(site.prefix_mlp_bias.shape))


def transformed(base: Any, projected: bool, encoder: Any) -> Any:
    """PEFT puts its prefix on the decoder's self-attention only."""
    where = " in decoder" if base.config.is_encoder_decoder else ""
    how = " via mlp 9" if projected else ""
    program = surgery.parse(f"prefix {N}{how} on all layers{where}")
    plan = surgery.plan(program, base)
    object.__setattr__(base, "surgery_heads", plan.steps[0].parts[0].heads.key_value)
    model = surgery.apply(plan, base)
    fill(model, encoder)
    return model


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_prefix_as_peft(family: str, projected: bool) -> None:
    """T5's prefix stands where PEFT's does, right in front of the first token: its relative positions go on."""
    base = built(family)
    peer = theirs(base, projected)
    model = transformed(copy.deepcopy(base), projected, peer.prompt_encoder["default"])
    fed = others.inputs(base) if base.config.is_encoder_decoder else zoo.inputs(base)
    wanted, plain = peer(**fed).logits, zoo.logits(base, fed)
    got = zoo.logits(model, fed)
    assert (got - wanted).abs().max() < 1e-6 * wanted.abs().max()
    assert (got - plain).abs().max() > 1e-2 * wanted.abs().max()
    if projected:
        surgery.merge(model)
        assert torch.equal(zoo.logits(model, fed), got)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_same_gradients_as_peft(family: str) -> None:
    """Training starts the same way too: gradients of all that both train, through the projection."""
    base = built(family)
    peer = theirs(base, True)
    encoder: nn.Module = peer.prompt_encoder["default"]
    model = transformed(copy.deepcopy(base), True, encoder)
    fed = zoo.inputs(base)
    for each in (peer, model):
        each(**fed, labels=fed["input_ids"]).loss.backward()
    first: Any = encoder.transform[0]  # type: ignore[index,union-attr]
    ours = sites(model)[0]
    pairs = {
        "bias": (ours.prefix_trunk_bias.grad, first.bias.grad),
        "weight": (ours.prefix_trunk_weight.grad[:, : first.in_features], first.weight.grad),
        "embedding": (ours.prefix_embedding.grad[:, : first.in_features], encoder.embedding.weight.grad),  # type: ignore[union-attr]
    }
    for got, wanted in pairs.values():
        assert wanted.abs().max() > 0
        assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()
