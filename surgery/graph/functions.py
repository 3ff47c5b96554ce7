"""The functions that rewritten graphs call beside torch's own: each is one line of mathematics and its fast form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def pack_bits(mask: Tensor) -> Tensor:
    """A boolean tensor as (ceil(numel / 8),) uint8, first element in the lowest bit."""
    flat = F.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The boolean tensor of that shape."""
    flat = (bits.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
    return flat.flatten()[: math.prod(shape)].view(*shape).bool()


def masked(weight: Tensor, bits: Tensor) -> Tensor:
    """weight * mask, for a weight whose masked entries are zero already.

    The product only matters to the gradient, so a frozen weight passes as it is and costs nothing.
    """
    return weight * unpack_bits(bits, weight.shape) if weight.requires_grad else weight


def add_branch(y: Any, branch: Any) -> Any:
    """y + branch, in y's dtype and rounded once: branches may be float32 over a 16-bit base."""
    return (y + branch).to(y.dtype)


def add_to_channels(y: Any, branch: Any, channels: Tensor) -> Any:
    """y with branch (..., len(channels)) added to some of its last dimension; all others keep their bits."""
    part = torch.index_select(y, -1, channels)
    return torch.index_copy(y, -1, channels, add_branch(part, branch))


def low_rank(x: Any, a: Tensor, b: Tensor, scale: float) -> Any:
    """scale * b a x in a's dtype. x: (..., in); a: (rank, in); b: (out, rank)."""
    return F.linear(F.linear(x.to(a.dtype), a), b) * scale


def low_rank_linear(x: Any, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Any:
    """weight x + bias + scale * b a x, as one function with its own gradient where all is of one dtype and base frozen.

    The rank-r product is accumulated into the output and saved for the backward pass instead of being taken again.
    """
    plain = (
        not isinstance(x, Tensor)
        or torch.compiler.is_compiling()
        or x.dtype != a.dtype
        or x.dtype != weight.dtype
        or not x.is_contiguous()  # torch takes another path there, with other rounding
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or torch.is_autocast_enabled(x.device.type)
        or type(weight) not in (Tensor, torch.nn.Parameter)
    )
    if plain:
        return add_branch(F.linear(x, weight, bias), low_rank(x, a, b, scale))
    if not torch.is_grad_enabled():
        return _forward(x.reshape(-1, x.shape[-1]), weight, bias, a, b, scale)[0].view(*x.shape[:-1], weight.shape[0])
    return LowRankLinear.apply(x, weight, bias, a, b, scale)  # type: ignore[no-untyped-call]


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The output, and scale * a x as (rank, tokens). x: (tokens, in).

    Products of a narrow matrix run fastest with the narrow side first, and the wide product is the one to accumulate:
    it reads its output anyway. With b = 0 that gives the bits of the plain map.
    """
    inner = torch.mm(a, x.t())
    if scale != 1:
        inner.mul_(scale)
    branch = torch.mm(inner.t(), b.t()) if bias is None else torch.addmm(bias, inner.t(), b.t())
    return branch.addmm_(x, weight.t()), inner


class LowRankLinear(torch.autograd.Function):
    """Gradients of `low_rank_linear` for x, a and b; the base is frozen and gets none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y, inner = _forward(flat, weight, bias, a, b, scale)
        ctx.save_for_backward(flat, weight, a, b, inner)
        ctx.scale, ctx.shape = scale, x.shape
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, inner = ctx.saved_tensors
        g = gradients[0].reshape(-1, gradients[0].shape[-1])
        # A copy always: `contiguous` of a rank-1 b is b itself, the parameter.
        outer = torch.mm(b.t().clone(memory_format=torch.contiguous_format).mul_(ctx.scale), g.t())
        grad_a = torch.mm(outer, x) if ctx.needs_input_grad[3] else None
        grad_b = torch.mm(inner, g).t() if ctx.needs_input_grad[4] else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(outer.t(), a).addmm_(g, weight).view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, None


def linear_as(x: Any, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Any:
    """weight x + bias computed in another dtype, back in x's. Merging takes the tensors as they are."""
    if not isinstance(x, Tensor):
        return F.linear(x, weight, bias)
    product = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return product.to(x.dtype)
