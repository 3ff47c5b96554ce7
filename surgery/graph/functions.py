"""The functions that rewritten graphs call beside torch's own: each is one line of mathematics and its fast form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx


def pack_bits(mask: Tensor) -> Tensor:
    """A boolean tensor as (ceil(numel / 8),) uint8, first element in the lowest bit."""
    flat = F.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The boolean tensor of that shape."""
    flat = (bits.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
    return flat.flatten()[: math.prod(shape)].view(*shape).bool()


def masked(weight: Any, bits: Any) -> Any:
    """weight * mask, for a weight whose masked entries are zero already.

    The product only matters to the gradient, so a frozen weight passes as it is and costs nothing. Traced by torch.fx,
    it stays one call: which of the two it is shows when the traced model runs.
    """
    if isinstance(weight, fx.Proxy):
        return weight.tracer.create_proxy("call_function", masked, (weight, bits), {})
    return weight * unpack_bits(bits, weight.shape) if weight.requires_grad else weight


def masked_unless(weight: Any, bits: Any, dense: Any) -> Any:
    """As `masked`; with the gradient of every weight while dense, (1,) uint8, is 255 and not 0.

    The value is the same, since masked entries are zero. A tensor says so, and no flag, so that compiled code asks too.
    """
    if isinstance(weight, fx.Proxy):
        return weight.tracer.create_proxy("call_function", masked_unless, (weight, bits, dense), {})
    return masked(weight, bits | dense)


def add_branch(y: Any, branch: Any) -> Any:
    """y + branch, in y's dtype and rounded once: branches may be float32 over a 16-bit base."""
    return (y + branch).to(y.dtype)


def wide_linear(x: Any, weight: Tensor, bias: Tensor) -> Any:
    """weight x + bias in the weight's dtype, which may be wider than x's."""
    return F.linear(x.to(weight.dtype), weight, bias)


def wide_norm(x: Any, weight: Tensor, bias: Tensor) -> Any:
    """Layer norm over the last dimension, in the weight's dtype."""
    return F.layer_norm(x.to(weight.dtype), weight.shape, weight, bias)


def shaped_like(branch: Any, y: Any) -> Any:
    """The branch in y's shape: some sub-layers read their tokens flattened."""
    return branch if branch.shape == y.shape else branch.reshape(y.shape)


def add_to_channels(y: Any, branch: Any, channels: Tensor) -> Any:
    """y with branch (..., len(channels)) added to some of its last dimension; all others keep their bits."""
    part = torch.index_select(y, -1, channels)
    return torch.index_copy(y, -1, channels, add_branch(part, branch))


def rescale(y: Any, factors: Tensor) -> Any:
    """y * factors over the last dimension, in y's dtype and rounded once."""
    return (y * factors).to(y.dtype)


def rescale_channels(y: Any, factors: Tensor, channels: Tensor) -> Any:
    """y with some of its last dimension multiplied by factors (len(channels),); all others keep their bits."""
    part = torch.index_select(y, -1, channels)
    return torch.index_copy(y, -1, channels, rescale(part, factors))


def low_rank(x: Any, a: Tensor, b: Tensor, scale: float) -> Any:
    """scale * b a x in a's dtype. x: (..., in); a: (rank, in); b: (out, rank)."""
    return F.linear(F.linear(x.to(a.dtype), a), b) * scale


def low_rank_linear(x: Any, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Any:
    """weight x + bias + scale * b a x, as one function with its own gradient where all is of one dtype and base frozen.

    The rank-r product is accumulated into the output and saved for the backward pass instead of being taken again.
    The tests stand in the order of their cost: on a warm processor all of them take a microsecond, between two large
    products ten.
    """
    if (
        not isinstance(x, Tensor)
        or x.dtype != weight.dtype
        or x.dtype != a.dtype
        or not x.is_contiguous()  # torch takes another path there, with other rounding
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or type(weight) not in (Tensor, torch.nn.Parameter)
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type)  # the type's name alone costs as much
    ):
        return add_branch(F.linear(x, weight, bias), low_rank(x, a, b, scale))
    if torch.is_grad_enabled():
        return LowRankLinear.apply(x, weight, bias, a, b, scale)  # type: ignore[no-untyped-call]
    return _forward(x, weight, bias, a, b, scale)[0]


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The output, and scale * a x as (rank, tokens).

    Products of a narrow matrix run fastest with the narrow side first, and the wide product is the one to accumulate:
    it reads its output anyway. With b = 0 that gives the bits of the plain map.
    """
    flat = x.view(-1, x.shape[-1])
    inner = torch.mm(a, flat.t())
    if scale != 1:
        inner.mul_(scale)
    branch = torch.mm(inner.t(), b.t()) if bias is None else torch.addmm(bias, inner.t(), b.t())
    return branch.addmm_(flat, weight.t()).view(*x.shape[:-1], weight.shape[0]), inner


class LowRankLinear(torch.autograd.Function):
    """Gradients of `low_rank_linear` for x, a and b; the base is frozen and gets none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        y, inner = _forward(x, weight, bias, a, b, scale)
        ctx.save_for_backward(x, weight, a, b, inner)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, inner = ctx.saved_tensors
        shape, x = x.shape, x.view(-1, x.shape[-1])
        g = gradients[0].reshape(-1, gradients[0].shape[-1])
        to_x, _, _, to_a, to_b, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted, and what was saved has no history
            inner = torch.mm(a, x.t()) * ctx.scale
        outer = torch.mm(b.t(), g.t())
        if ctx.scale != 1:
            outer = outer * ctx.scale
        grad_a = torch.mm(outer, x) if to_a else None
        grad_b = torch.mm(inner, g).t() if to_b else None
        grad_x = torch.mm(outer.t(), a).addmm_(g, weight).view(shape) if to_x else None
        return grad_x, None, None, grad_a, grad_b, None


def linear_as(x: Any, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Any:
    """weight x + bias computed in another dtype, back in x's. Merging takes the tensors as they are."""
    if not isinstance(x, Tensor):
        return F.linear(x, weight, bias)
    product = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return product.to(x.dtype)
