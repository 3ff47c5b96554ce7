"""The matrix of a rank nearest to another, as the two factors of an adapter (Eckart and Young 1936)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.lazy import torch
from surgery.operations.lora_init import factors

if TYPE_CHECKING:
    from torch import Tensor

STRETCH = 1 << 22  # entries taken to float64 at a time


def nearest(delta: Tensor, rank: int, factor: float) -> tuple[Tensor, Tensor, int]:
    """A (rank, in), B (out, rank) with factor * B A nearest to an (out, in) matrix in every unitarily invariant norm.

    The third is how many of their rows and columns say something: as many as the matrix has a rank, at most. The left
    singular vectors are eigenvectors of delta delta^T (of delta^T delta where that is smaller), which takes memory for
    the smaller side squared in float64; float64 is also what the factors come in.
    """
    wide = delta if delta.shape[0] <= delta.shape[1] else delta.t()
    step = max(1, STRETCH // wide.shape[0])
    gram = torch.zeros(wide.shape[0], wide.shape[0], dtype=torch.float64)
    for stretch in wide.split(step, dim=1):
        gram.addmm_(stretch.double(), stretch.t().double())
    left = torch.linalg.eigh(gram)[1][:, -rank:].flip(1)
    right = torch.cat([stretch.t().double() @ left for stretch in wide.split(step, dim=1)])
    sigma = torch.linalg.vector_norm(right, dim=0)
    real = sigma > sigma.max() * wide.shape[0] * torch.finfo(torch.float64).eps  # what is smaller is no direction
    sigma, right = sigma * real, right / sigma.where(real, torch.ones(()).double())
    u, v = (left, right) if wide is delta else (right, left)
    a, b = factors(u, sigma, v.t(), rank, factor)
    return a, b, int(real.sum())


def left_over(delta: Tensor, a: Tensor, b: Tensor, factor: float) -> float:
    """|delta - factor * B A| in Frobenius norm, of the factors as they are kept."""
    total = 0.0
    step = max(1, STRETCH // max(1, delta.shape[1]))
    for rows, product in zip(delta.split(step), b.double().split(step), strict=True):
        total += float((rows.double() - factor * product @ a.double()).square().sum())
    return float(total**0.5)
