"""What the two factors of a low-rank adapter start as: at random, or taken out of the weight that they adapt."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from surgery.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Generator, Tensor

    from surgery.graph.site import Site


def kaiming(a: Tensor, generator: Generator) -> None:
    """Uniform in +-1/sqrt(in), as Microsoft's loralib: Kaiming with a = sqrt(5)."""
    bound = a.shape[-1] ** -0.5
    torch.nn.init.uniform_(a, -bound, bound, generator=generator)


def normal(a: Tensor, generator: Generator) -> None:
    """Standard deviation one over the rank."""
    torch.nn.init.normal_(a, std=1 / min(a.shape[-2:]), generator=generator)


def xavier(a: Tensor, generator: Generator) -> None:
    """Uniform with the variance 2 / (in + rank)."""
    bound = math.sqrt(6 / (a.shape[-1] + a.shape[-2]))
    torch.nn.init.uniform_(a, -bound, bound, generator=generator)


def orthogonal(a: Tensor, generator: Generator) -> None:
    """Orthonormal rows; of a stack, the rows of each matrix."""
    for matrix in a if a.dim() > 2 else (a,):
        torch.nn.init.orthogonal_(matrix, generator=generator)


RANDOM: Mapping[str, Callable[[Tensor, Generator], None]] = {
    "kaiming": kaiming,
    "normal": normal,
    "xavier": xavier,
    "orthogonal": orthogonal,
}


def pissa(site: Site, rank: int, factor: float) -> tuple[Tensor, Tensor]:
    """A and B from the weight's largest singular triplets; the base keeps what they leave over (Meng et al. 2024).

    Over codes the residual is what is quantized (QPiSSA): its values spread less than those of the whole weight.
    """
    weight = wide(site)
    u, sigma, v = torch.linalg.svd(weight, full_matrices=False)
    site.hold_rows(weight - (u[:, :rank] * sigma[:rank]) @ v[:rank])
    return factors(u, sigma, v, rank, factor)


def loftq(site: Site, rank: int, factor: float, iterations: int) -> tuple[Tensor, Tensor]:
    """Codes Q of W - s B A, and A and B nearest to W - Q, in turns (Li et al. 2023). B A starts at zero."""
    weight = wide(site)
    residual, codes = weight, site.own_rows(site.weight)
    for _ in range(iterations):
        site.hold_rows(residual)
        u, sigma, v = torch.linalg.svd(weight - site.evaluate(codes).to(weight.dtype), full_matrices=False)
        residual = weight - (u[:, :rank] * sigma[:rank]) @ v[:rank]
    return factors(u, sigma, v, rank, factor)


def wide(site: Site) -> Tensor:
    """The part's rows of the weight at full width, in float32 at least."""
    weight = site.evaluate(site.own_rows(site.full_weight))
    return weight.to(torch.float32) if weight.dtype.itemsize < 4 else weight


def factors(u: Tensor, sigma: Tensor, v: Tensor, rank: int, factor: float) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) of equal size with factor * B A = the top `rank` triplets."""
    root = (sigma[:rank] / factor).sqrt()
    return root.unsqueeze(1) * v[:rank], u[:, :rank] * root
