"""Pruning that goes on while a model is trained: the share that has gone by then, and the next weights to go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from surgery.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def cubic(first: float, last: float, part: float) -> float:
    """s_f + (s_i - s_f) (1 - part)^3: much goes early, while there is still much to spare (Zhu and Gupta 2017)."""
    return float(last + (first - last) * (1 - part) ** 3)


def cut_further(
    masks: Sequence[Tensor], weights: Sequence[Tensor], stays: Callable[[Sequence[Tensor]], list[Tensor]]
) -> list[Tensor]:
    """The masks that stays makes of |w|, (out, in) each; what has gone before goes first, and never comes back."""
    sizes = [wide(weight).abs().masked_fill(~mask, -1) for mask, weight in zip(masks, weights, strict=True)]
    kept = stays(sizes)
    fewer = sum(int(mask.sum()) for mask in kept) < sum(int(mask.sum()) for mask in masks)
    return kept if fewer else list(masks)


def wide(weight: Tensor) -> Tensor:
    """In float32 at least, where sizes are ranked."""
    return weight.to(torch.float32) if weight.dtype.itemsize < 4 else weight
