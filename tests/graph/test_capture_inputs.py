"""A rewritten map is called as the one before, however its input lies in memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.operations.base import Operation
from surgery.operations.lora import Lora
from surgery.operations.prune import Prune
from surgery.operations.quantize import Quantize
from tests.graph.rewriting import rewrite


@pytest.mark.parametrize(
    "operation", [Lora(rank=2), Quantize(format="nf4"), Quantize(format="int8"), Prune(score="magnitude", amount=0.5)]
)
def test_a_rewritten_map_is_called_as_the_one_before(operation: Operation) -> None:
    """frame: by the keyword that torch's own linear map and lookup have, as well as by place."""
    torch.manual_seed(0)
    made, x = rewrite(nn.Linear(6, 9), operation), torch.randn(2, 6)
    assert torch.equal(made(input=x), made(x))
    if isinstance(operation, Lora):
        lookup = nn.Embedding(11, 9)
        ids = torch.tensor([[1, 3]])
        wanted = lookup(input=ids)
        assert torch.equal(rewrite(lookup, operation)(input=ids), wanted)


LAYOUTS: dict[str, Callable[[int], Tensor]] = {
    "first half": lambda n: torch.randn(3, 5, 2 * n)[..., :n],
    "second half": lambda n: torch.randn(3, 5, 2 * n)[..., n:],
    "every other": lambda n: torch.randn(4, 7, 2 * n)[..., ::2],
    "first position": lambda n: torch.randn(4, 9, n)[:, 0],
    "without the last": lambda n: torch.randn(3, 9, n)[:, :-1],
    "features in front": lambda n: torch.randn(5, n, 4).transpose(1, 2),
    "transposed": lambda n: torch.randn(n, 33).t(),
    "batch second": lambda n: torch.randn(7, 2, n).transpose(0, 1),
    "expanded": lambda n: torch.randn(1, 1, n).expand(3, 5, n),
    "one row": lambda n: torch.randn(n),
    "four dimensions": lambda n: torch.randn(2, 3, 4, n),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_identity_holds_however_the_input_lies_in_memory(layout: str) -> None:
    """identity_at_init: to the bit for views, cuts and transposes too, with gradients and without, biased or not."""
    torch.manual_seed(0)
    for outputs, inputs in ((37, 24), (384, 384), (1536, 384)):
        for bias in (True, False):
            module = nn.Linear(inputs, outputs, bias).requires_grad_(False)
            x = LAYOUTS[layout](inputs)
            wanted = module(x)
            made = rewrite(module, Lora(rank=8))
            for wants in (True, False):
                with torch.set_grad_enabled(wants):
                    assert torch.equal(made(x), wanted), (outputs, inputs, bias, wants)


@pytest.mark.parametrize("layout", ["every other", "features in front", "expanded"])
def test_the_gradient_holds_however_the_input_lies_in_memory(layout: str) -> None:
    """lora: gradients of a view are those of its copy."""
    torch.manual_seed(0)
    made = rewrite(nn.Linear(6, 9).requires_grad_(False), Lora(rank=2))
    a, b = made.get_parameter("a0_lora_A"), made.get_parameter("a0_lora_B")
    b.data.normal_()
    x = LAYOUTS[layout](6)
    pull = torch.randn(made(x).shape)
    for given in (x, x.contiguous()):
        found = torch.autograd.grad((made(given) * pull).sum(), (a, b))
        wanted = torch.autograd.grad((F.linear(F.linear(x, a), b) * pull).sum(), (a, b))
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
