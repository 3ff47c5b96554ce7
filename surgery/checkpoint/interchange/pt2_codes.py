"""What bitsandbytes' operators compute, in torch's own: slower, and for whoever has torch alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def plain_operators() -> Mapping[Any, Callable[..., Tensor]]:
    """By operator, a function of the same arguments and the same bits. Needs bitsandbytes, which registers them."""
    from bitsandbytes.functional import get_4bit_type

    levels = {format: get_4bit_type(format, device="cpu").tolist() for format in ("nf4", "fp4")}

    def dequantize_4bit(
        packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: list[int], dtype: torch.dtype
    ) -> Tensor:
        """Two codes in a byte, the first one in the high half, and a scale for each block."""
        # Made of numbers, for a tensor would be a constant that the program has to hold.
        table = torch.cat([torch.full((1,), level, device=packed.device) for level in levels[quant_type]])
        flat = packed.reshape(-1)
        codes = torch.stack((flat >> 4, flat & 15), dim=-1).reshape(-1)
        return (table[codes.long()] * _spread(absmax, blocksize, codes.numel())).to(dtype).reshape(shape)

    def dequantize_blockwise(codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
        """A code of 8 bits, and a scale for each block."""
        scales = _spread(absmax, blocksize, codes.numel()).reshape(codes.shape)
        return (code[codes.long()] * scales).to(dtype)

    return {
        torch.ops.bitsandbytes.dequantize_4bit.default: dequantize_4bit,
        torch.ops.bitsandbytes.dequantize_blockwise.default: dequantize_blockwise,
    }


def _spread(scales: Tensor, blocksize: int, count: int) -> Tensor:
    """The scale of each of `count` codes."""
    return scales.reshape(-1, 1).expand(-1, blocksize).reshape(-1)[:count]
