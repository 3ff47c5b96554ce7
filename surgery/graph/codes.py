"""Codes in a graph, 4 bits or 8: widen them, and multiply by what they stand for without keeping it (bitsandbytes)."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor

from surgery.graph.functions import linear_as
from surgery.graph.jit import available

NESTED_BLOCK = 256
LARGEST = 127  # of 8-bit codes


def register() -> None:
    """Import bitsandbytes, which registers the operators used here, without its remarks on optional kernels."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401
    finally:
        logger.setLevel(level)


def encode(weight: Tensor, format: str, block: int, double: bool) -> tuple[Tensor, Any]:
    """bitsandbytes' codes (ceil(numel / 2), 1) uint8 and quantization state of a (out, in) weight.

    A float64 weight is narrowed to float32 first, which is the widest that bitsandbytes reads. On a CPU our own encoder
    gives the same bytes sooner, where numba can be used.
    """
    import bitsandbytes.functional as bnb

    narrow = weight.to(torch.float32) if weight.dtype == torch.float64 else weight
    if weight.device.type == "cpu" and weight.numel() % block == 0 and available():
        from surgery.graph.encode import encode_blocks

        levels = bnb.get_4bit_type(format, device="cpu")
        codes, absmax = encode_blocks(narrow, levels, block)
        state = bnb.QuantState(absmax, weight.shape, levels, block, format, narrow.dtype)
        if double:
            state.offset = absmax.mean()
            state.absmax, state.state2 = bnb.quantize_blockwise(absmax - state.offset, blocksize=NESTED_BLOCK)
            state.nested = True
        return codes, state
    codes, state = bnb.quantize_4bit(
        narrow.contiguous(), blocksize=block, compress_statistics=double, quant_type=format
    )
    return codes, state


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_map: Tensor | None,
    offset: Tensor | None,
    format: str,
    block: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """The (out, in) weight of bitsandbytes' packed 4-bit codes, in `dtype` (through float32 where that is float64).

    Needs `register` to have run. Only reads `packed`, which bitsandbytes' own linear layer may repack in place on some
    processors.
    """
    if nested_absmax is not None and nested_map is not None and offset is not None:
        absmax = torch.ops.bitsandbytes.dequantize_blockwise(
            absmax, nested_absmax, nested_map, NESTED_BLOCK, torch.float32
        )
        absmax = absmax + offset
    known = dtype if dtype in (torch.float16, torch.bfloat16, torch.float32) else torch.float32
    # As one even row: blocks run through the flat weight, and odd widths would leave the compiled kernel.
    flat = torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, block, format, (1, 2 * packed.numel()), known)
    weight: Tensor = flat.view(-1)[: math.prod(shape)].view(shape).to(dtype)
    return weight


def encode_8bit(weight: Tensor) -> tuple[Tensor, Tensor]:
    """bitsandbytes' int8 codes of a (out, in) weight, and the largest magnitude of each row (LLM.int8, Dettmers 2022).

    As there, the weight is narrowed to float16 first, where that can hold it. A row of zeros has codes of zero.
    """
    narrow = weight.to(torch.float16)
    if not bool(narrow.isfinite().all()):
        narrow = weight.to(torch.float32)
    absmax = narrow.abs().amax(dim=1).to(torch.float32)
    steps = torch.where(absmax > 0, LARGEST / absmax, 0.0)
    return (narrow * steps.unsqueeze(1)).round().to(torch.int8), absmax


def dequantize_8bit(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """The (out, in) weight of int8 codes (out, in) and the magnitudes of their rows, in `dtype`."""
    return codes.to(dtype).mul_(absmax.unsqueeze(1).mul(1.0 / LARGEST))


DEQUANTIZE = (dequantize_4bit, dequantize_8bit)
"""What widens codes; the dtype is the last argument."""


def _dequantize(state: tuple[Any, ...]) -> Tensor:
    return dequantize_8bit(*state) if len(state) == 3 else dequantize_4bit(*state)


def quantized_linear(x: Any, bias: Tensor | None, compute: torch.dtype | None, *state: Any) -> Any:
    """The widened codes times x, + bias; the backward pass dequantizes again instead of keeping the wide weight.

    state: arguments of one of `DEQUANTIZE`.
    """
    if not isinstance(x, Tensor) or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _wide_linear(x, bias, compute, state)
    return QuantizedLinear.apply(x, bias, compute, *state)  # type: ignore[no-untyped-call]


def _wide_linear(x: Any, bias: Tensor | None, compute: torch.dtype | None, state: tuple[Any, ...]) -> Any:
    weight = _dequantize(state)
    return linear_as(x, weight, bias, compute or x.dtype)


class QuantizedLinear(torch.autograd.Function):
    """Gradients of `quantized_linear` for x and the bias; the codes have none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, compute: torch.dtype | None, *state: Any) -> Tensor:
        ctx.state, ctx.compute, ctx.dtype = state, compute, x.dtype
        if torch.is_autocast_enabled(x.device.type) and compute is None:
            ctx.compute = compute = torch.get_autocast_dtype(x.device.type)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _wide_linear(x, bias, compute, state)  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        g = gradients[0]
        dtype = ctx.compute or ctx.dtype
        grad_x = (g.to(dtype) @ _dequantize(ctx.state).to(dtype)).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        grad_bias = g.reshape(-1, g.shape[-1]).sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, None, *(None for _ in ctx.state)
