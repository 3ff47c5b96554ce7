"""No optimizer moves a zero: of torch or by name, in eight bits, with moving masks, with static ones and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import surgery
from tests import zoo
from tests.training.wide import FED, GRADUAL, RIGL, applied, loss, places, train

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, foreach=False),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01, weight_decay=0.1),
    "radam": lambda p: torch.optim.RAdam(p, 0.01, weight_decay=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, 0.01, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01, weight_decay=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, 1.0, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p, 0.01),
    "asgd": lambda p: torch.optim.ASGD(p, 0.01, weight_decay=0.1),
}
NAMED = ("adamw", "adamw8bit", "adam8bit", "lion", "lion8bit", "sgd8bit", "adamw8bit paged", "adamw paged")


@pytest.mark.parametrize("text", [RIGL, RIGL.replace("rigl", "set"), GRADUAL], ids=lambda text: text.split()[1])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimizer_of_torch_moves_a_zero(name: str, text: str) -> None:
    for late in (False, True):
        model = applied(text)
        before = [each.weight.detach().clone() for each in places(model)]
        assert any(train(model, OPTIMIZERS[name](surgery.parameters(model).values()), 10, late))
        assert not any(torch.equal(each.weight, was) for each, was in zip(places(model), before, strict=True))
        report = surgery.verify(model, example_inputs=FED)
        assert report, str(report)


@pytest.mark.parametrize("text", [RIGL, RIGL.replace("rigl", "set"), GRADUAL], ids=lambda text: text.split()[1])
@pytest.mark.parametrize("name", NAMED)
def test_no_named_optimizer_moves_a_zero(name: str, text: str) -> None:
    """bitsandbytes' 8-bit states too, in memory and paged: a zero there is a code."""
    for late in (False, True):
        model = applied(f"{text}\noptimize {name} lr 0.01 decay 0.1")
        optimizer: Any = surgery.optimizer(model)
        assert any(train(model, optimizer, 10, late))
        if "8bit" in name:
            assert any(
                each.dtype == torch.uint8
                for state in optimizer.state.values()
                for each in state.values()
                if isinstance(each, Tensor)
            )
        assert surgery.verify(model, example_inputs=FED)


def test_static_masks_are_left_alone() -> None:
    model = applied("sparse static 80% on ffn")
    masks = [each.mask() for each in places(model)]
    assert not any(train(model, OPTIMIZERS["adamw"](surgery.parameters(model).values()), 4))
    assert all(torch.equal(each.mask(), mask) for each, mask in zip(places(model), masks, strict=True))


@pytest.mark.parametrize("name", ["adamw8bit", "lion8bit"])
def test_trained_pruned_weights_keep_their_zeros_in_8_bits(name: str) -> None:
    """Without a schedule too, and in a fused projection of which only some rows are pruned."""
    model = zoo.tiny("gpt2", n_embd=66, n_inner=70)
    surgery.apply(
        surgery.parse(f"train attn + ffn\nprune magnitude 50% on attn.q,v + ffn\noptimize {name} lr 0.01"), model
    )
    zeros = {each.part.path: each.weight == 0 for each in places(model)}
    optimizer: Any = surgery.optimizer(model)
    fed = zoo.inputs(model)
    for _ in range(3):
        model(**fed).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for each in places(model):
        assert optimizer.state[each.weight]["state1"].dtype == torch.uint8
        assert torch.equal(each.weight == 0, zeros[each.part.path])
    assert surgery.verify(model).of("exact_sparsity")


def test_codes_have_no_zeros_to_hold() -> None:
    """A pruned weight in four bits is not trained, whatever the optimizer of what is."""
    model = applied("prune magnitude 50% on ffn\nquantize base nf4\nlora rank 2 on ffn\noptimize adamw8bit lr 0.01")
    optimizer: Any = surgery.optimizer(model)
    before = {name: tensor.clone() for name, tensor in surgery.parameters(model).items()}
    loss(model).backward()
    optimizer.step()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in surgery.parameters(model).items())
    assert surgery.verify(model, example_inputs=FED)
