"""Projections and lookups rewritten in place: what is captured, what keeps its name, what comes back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.errors import GraphError
from surgery.graph.capture import capture
from surgery.graph.fold import fold
from surgery.graph.module import added_parameters, switched
from surgery.operations.lora import Lora
from surgery.operations.prune import Prune
from surgery.operations.quantize import Quantize
from tests.graph.forwards import InOut
from tests.graph.rewriting import holder, rewrite


class Doubled(nn.Linear):
    """A subclass of nn.Linear that is not one: peers wrap it silently and merge it wrongly."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 2, self.bias) + 1


class ScaledEmbedding(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 3.0


class Deciding(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x[..., :1].expand(*x.shape[:-1], self.out_features)


class Weightless(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


MODULES = {
    "linear": lambda: nn.Linear(6, 9),
    "no bias": lambda: nn.Linear(6, 9, bias=False),
    "in, out": InOut,
    "doubled": lambda: Doubled(6, 9),
    "embedding": lambda: nn.Embedding(11, 9, padding_idx=0),
    "scaled embedding": lambda: ScaledEmbedding(11, 9),
}


def fed(module: nn.Module) -> Tensor:
    return torch.randint(0, 11, (2, 3)) if isinstance(module, nn.Embedding) else torch.randn(2, 3, 6)


@pytest.mark.parametrize("name", MODULES)
def test_lora_starts_as_identity_and_merges(name: str) -> None:
    """identity_at_init and merges, also for modules whose forward is their own."""
    torch.manual_seed(0)
    module = MODULES[name]()
    x = fed(module)
    wanted = module(x)
    made = rewrite(module, Lora(rank=3, alpha=5))
    assert torch.equal(made(x), wanted)
    for parameter in added_parameters(holder(made)).values():
        parameter.data.normal_()
    trained = made(x)
    assert not torch.allclose(trained, wanted)
    plain = fold(made)
    torch.testing.assert_close(plain(x), trained, rtol=1e-5, atol=1e-5)
    assert type(plain) is type(module)


@pytest.mark.parametrize("name", MODULES)
def test_names_of_the_base_stay(name: str) -> None:
    """frame: a state dict keeps the base's keys, and what is added stands beside them."""
    module = MODULES[name]()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    made = rewrite(module, Lora(rank=2))
    after = made.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert set(after) - set(before) == {"a0_lora_A", "a0_lora_B"}


def test_a_slice_leaves_all_other_channels_alone() -> None:
    """frame: with an adapter on some rows, all others keep their bits, unmerged and merged."""
    module = nn.Linear(6, 9)
    x, weight = torch.randn(2, 3, 6), module.weight.detach().clone()
    wanted = module(x)
    made = rewrite(module, Lora(rank=2), channels=((1, 3), (7, 9)))
    assert made.get_parameter("a0_lora_B_q").shape == (4, 2)
    made.get_parameter("a0_lora_B_q").data.normal_()
    others = [0, 3, 4, 5, 6]
    assert torch.equal(made(x)[..., others], wanted[..., others])
    assert not torch.allclose(made(x)[..., [1, 2, 7, 8]], wanted[..., [1, 2, 7, 8]])
    plain = fold(made)
    assert torch.equal(plain.get_parameter("weight")[others], weight[others])
    torch.testing.assert_close(plain(x), made(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "operations", [(Prune(score="magnitude", amount=0.5), Quantize(format="nf4", double=True), Lora(rank=2))]
)
def test_edits_compose(operations: tuple[Any, ...]) -> None:
    """Pruned, then quantized, then adapted: zeros stay zero, the branch is on top, merging gives one plain map."""
    torch.manual_seed(0)
    module = nn.Linear(16, 9)
    made = rewrite(module, *operations)
    made.get_parameter("a2_lora_B").data.normal_()
    x = torch.randn(4, 16)
    plain = fold(made)
    torch.testing.assert_close(plain(x), made(x), rtol=1e-4, atol=1e-5)
    with switched(holder(made), {None}):
        base = made(torch.eye(16)) - made(torch.zeros(1, 16))
    assert int((base == 0).sum()) >= 72
    assert made.get_parameter("weight_codes").dtype == torch.uint8
    assert made.weight.dtype == torch.float32


def test_gradients_of_the_fused_function_are_those_of_the_plain_one() -> None:
    """lora: the function with its own backward pass agrees with torch's differentiation of the formula."""
    torch.manual_seed(0)
    made = rewrite(nn.Linear(6, 9).double(), Lora(rank=2, alpha=3))
    for parameter in made.parameters():
        parameter.requires_grad_(False)
    a, b = made.get_parameter("a0_lora_A"), made.get_parameter("a0_lora_B")
    b.data.normal_()
    for tensor in (a, b):
        tensor.requires_grad_()
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert "low_rank_linear" in made.code
    weight, bias = made.get_parameter("weight"), made.get_parameter("bias")
    pull = torch.randn(2, 3, 9, dtype=torch.float64)
    found = torch.autograd.grad((made(x) * pull).sum(), (x, a, b))
    plain = F.linear(x, weight, bias) + 1.5 * F.linear(F.linear(x, a), b)
    for mine, wanted in zip(found, torch.autograd.grad((plain * pull).sum(), (x, a, b)), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)
        assert wanted.abs().max() > 0


def test_copies_are_independent() -> None:
    """A deep copy computes the same, can be switched alone, and shares no tensor."""
    made = rewrite(nn.Linear(6, 9), Lora(rank=2))
    made.get_parameter("a0_lora_B").data.normal_()
    copied, x = copy.deepcopy(made), torch.randn(2, 6)
    assert torch.equal(copied(x), made(x))
    copied.switch({"a0"})
    assert not torch.allclose(copied(x), made(x))
    assert not {t.data_ptr() for t in copied.parameters()} & {t.data_ptr() for t in made.parameters()}


@pytest.mark.parametrize(("module", "code"), [(Deciding(6, 9), "S301"), (Weightless(6, 6), "S302")])
def test_what_cannot_be_captured_is_refused(module: nn.Module, code: str) -> None:
    """Error: a module is rewritten as what it computes, or not at all."""
    with pytest.raises(GraphError) as caught:
        capture(module, "a.b")
    assert caught.value.diagnostics[0].code == code
    assert "a.b" in str(caught.value)
