"""How changes of a weight are mixed: their weighted sum, and the two ways of the literature to let them interfere less.

All tensors are (out, in) changes of one weight in one floating dtype, one for each adapter, with its share.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor


def weighted_sum(deltas: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """sum of w_t D_t: task arithmetic (Ilharco et al. 2023)."""
    return torch.stack([share * delta for delta, share in zip(deltas, shares, strict=True)]).sum(0)


def ties(deltas: Sequence[Tensor], shares: Sequence[float], density: float) -> Tensor:
    """Trim, elect a sign, take the mean of those who have it (TIES, Yadav et al. 2023); the changes are task vectors.

    Trim: of each change the `density` largest entries stay. Elect: the sign of the trimmed changes' plain sum, positive
    where that is zero. Mean: of w_t D_t over the adapters whose entry is left and has that sign.
    """
    trimmed = torch.stack([trim(delta, density) for delta in deltas])
    elected = torch.where(trimmed.sum(0) >= 0, 1, -1)
    agree = trimmed.sign() == elected
    weighted = trimmed * trimmed.new_tensor(shares).view(-1, *(1,) * (trimmed.dim() - 1))
    return torch.where(agree, weighted, 0).sum(0) / agree.sum(0).clamp(min=1)


def trim(delta: Tensor, density: float) -> Tensor:
    """The `density` share of the entries that is largest by magnitude, rounded down; zeros elsewhere."""
    flat = delta.reshape(-1)
    kept = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(delta)


def dare(deltas: Sequence[Tensor], shares: Sequence[float], density: float, generator: Generator) -> Tensor:
    """Drop at random and rescale, then the weighted sum (DARE, Yu et al. 2024): the expectation is that of the sum.

    Each entry of each change stays with the probability `density` and is divided by it.
    """
    return weighted_sum([drop(delta, density, generator) for delta in deltas], shares)


def drop(delta: Tensor, density: float, generator: Generator) -> Tensor:
    """Entries kept with the probability `density` and divided by it. Drawn on the CPU, in float32."""
    kept = torch.rand(delta.shape, generator=generator) < density
    return torch.where(kept.to(delta.device), delta / density, 0)


def truncated(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """B and A of this rank next to the product b a (out, r) x (r, in), and the share of its squared norm they keep.

    The singular values are those of a small core, so nothing of the size of the weight is decomposed.
    """
    if b.shape[1] >= min(b.shape[0], a.shape[1]):
        return best(b @ a, rank)
    left, upper = torch.linalg.qr(b)
    right, lower = torch.linalg.qr(a.t())
    core_b, core_a, kept = best(upper @ lower.t(), rank)
    return left @ core_b, core_a @ right.t(), kept


def best(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """B (out, rank) and A (rank, in) whose product is the nearest of that rank, balanced, and what share they keep."""
    u, sigma, v = torch.linalg.svd(delta, full_matrices=False)
    root = sigma[:rank].sqrt()
    whole = float(sigma.square().sum())
    kept = float(sigma[:rank].square().sum()) / whole if whole else 1.0
    return u[:, :rank] * root, root.unsqueeze(1) * v[:rank], kept
