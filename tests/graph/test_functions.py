"""The functions that generated code calls, against their plain formulas."""

from __future__ import annotations

import pytest
import torch

from surgery.graph.functions import low_rank_linear


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("scale", [1.0, 1.7])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_fused_product_has_the_gradients_of_the_formula(rank: int, scale: float, with_bias: bool) -> None:
    made = torch.Generator().manual_seed(rank)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=made)

    weight, bias = draw(4, 5), draw(4) if with_bias else None
    x, a, b = (draw(*shape).requires_grad_() for shape in ((2, 3, 5), (rank, 5), (4, rank)))
    before = b.detach().clone()

    def product(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return low_rank_linear(x, weight, bias, a, b, scale)

    plain = torch.nn.functional.linear(x, weight + scale * b @ a, bias)
    torch.testing.assert_close(product(x, a, b), plain, rtol=0, atol=1e-13)
    assert "LowRankLinear" in type(product(x, a, b).grad_fn).__name__
    assert torch.autograd.gradcheck(product, (x, a, b))
    assert torch.autograd.gradgradcheck(product, (x, a, b))
    assert torch.equal(before, b)
