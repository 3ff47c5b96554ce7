"""The same A and B for every expert give PEFT's logits, whose `target_parameters` adapt stacked weights."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import surgery
from surgery.graph.stack import CHILD
from tests import zoo

STACKS = ("gate_up_proj", "down_proj")


def layer_of(model: Any, name: str) -> Any:
    """PEFT nests one wrapper for each parameter of a module in another."""
    layer = model
    while layer.parameter_name != name:
        layer = layer.base_layer
    return layer


@torch.no_grad()
def peft_experts(model: Any, rank: int, alpha: float, rs: bool) -> tuple[Any, dict[str, Tensor]]:
    """PEFT's LoRA on the stacks of a copy, at random, and its tensors by our names: (experts, rank, in) and so on."""
    from peft import LoraConfig, get_peft_model

    names = [f"mlp.experts.{name}" for name in STACKS]
    configuration = LoraConfig(r=rank, lora_alpha=alpha, target_modules=[], target_parameters=names, use_rslora=rs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(copy.deepcopy(model), configuration).eval()
    tensors: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if not path.endswith("mlp.experts"):
            continue
        for name in STACKS:
            layer = layer_of(adapted.get_submodule(f"base_model.model.{path}"), name)
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            for letter, tensor in (("A", a), ("B", b)):
                draw = torch.randn(tensor.shape, generator=zoo.seeded(5, f"{path}{name}{letter}"), dtype=torch.float64)
                tensor.copy_(0.3 * draw)
            count = module.num_experts
            tensors[f"{path}.{CHILD}.lora_A_{name}"] = a.reshape(count, -1, a.shape[-1])
            tensors[f"{path}.{CHILD}.lora_B_{name}"] = b.reshape(b.shape[0], -1, count).permute(2, 0, 1)
    return adapted, tensors


@pytest.mark.parametrize("rs", [False, True], ids=["plain", "rs"])
@pytest.mark.parametrize("family", zoo.EXPERTS)
def test_logits_and_gradients_equal_pefts(family: str, rs: bool) -> None:
    model = zoo.tiny(family)
    fed = zoo.inputs(model)
    base = zoo.logits(model, fed)
    peer, tensors = peft_experts(model, 3, 5, rs)
    wanted = zoo.logits(peer, fed)
    surgery.apply(surgery.parse(f"lora rank 3 alpha 5 {'scale rs ' * rs}on experts"), model)
    ours = surgery.parameters(model)
    assert ours.keys() == tensors.keys()
    with torch.no_grad():
        for name, tensor in tensors.items():
            assert ours[name].shape == tensor.shape, name
            ours[name].copy_(tensor)
    assert (zoo.logits(model, fed) - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    assert (base - wanted).abs().max() > 0.01 * wanted.abs().max(), "adapters without an effect prove nothing"
    for each in (model, peer):
        each(**fed).logits.square().mean().backward()
    theirs = [p.grad.norm() for p in peer.parameters() if p.grad is not None and p.requires_grad]
    mine = [p.grad.norm() for p in ours.values() if p.grad is not None]
    assert len(theirs) == len(mine) == len(ours)
    assert torch.allclose(torch.stack(theirs).sort().values, torch.stack(mine).sort().values, rtol=1e-4)


def test_a_merge_equals_pefts() -> None:
    model = zoo.tiny("mixtral")
    peer, tensors = peft_experts(model, 2, 4, rs=False)
    surgery.apply(surgery.parse("lora rank 2 alpha 4 on experts"), model)
    with torch.no_grad():
        for name, parameter in surgery.parameters(model).items():
            parameter.copy_(tensors[name])
    theirs = peer.merge_and_unload().state_dict()
    ours = surgery.merge(model).state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).abs().max() <= 1e-6 * tensor.abs().max(), name
