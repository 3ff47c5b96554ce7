"""How much error arithmetic may make: bounds derived from the dtype, the depth and the norms, not guessed."""

from __future__ import annotations

import torch
from torch import Tensor

SAFETY = 16.0
"""Constant of `merge_bound`; the errors measured over dtypes and depths 1 to 64 stay below half of it."""


def merge_bound(dtype: torch.dtype, depth: int = 1, branch: float = 0.0) -> float:
    """Largest relative difference between a merged and an unmerged forward: 16 eps depth (1 + s |A| |B| / |W|).

    dtype: the coarsest one on the way. depth: number of rewritten maps in a row.
    branch: s |A| |B| / |W| in Frobenius norms, the weight of the branch against the base.
    """
    return SAFETY * torch.finfo(dtype).eps * depth * (1.0 + branch)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Largest absolute difference over the largest absolute value wanted; 0 when both are zero everywhere."""
    found, wanted = found.detach().double(), wanted.detach().double()
    if found.shape != wanted.shape:
        return float("inf")
    if not wanted.numel():
        return 0.0
    difference = (found - wanted).abs().max().item()
    largest = wanted.abs().max().item()
    if difference == 0:
        return 0.0
    return difference / largest if largest else float("inf")


def coarsest(*dtypes: torch.dtype) -> torch.dtype:
    """The floating dtype with the largest eps."""
    floating = [dtype for dtype in dtypes if dtype.is_floating_point]
    return max(floating, key=lambda dtype: torch.finfo(dtype).eps)
