"""What rounding did to a block of a change, in one pass over it; torch takes eight.

Needs numba (the extra `fast`).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surgery.graph.jit import jit

# Sums may be taken in any order, so that several are taken at once; what is no number stays none.
_ANY_ORDER = {"reassoc", "nsz", "contract"}


@jit(nogil=True, fastmath=_ANY_ORDER)
def _measure(exact: Any, rounded: Any, base: Any, brain: bool, values: Any) -> tuple[int, int, float, float]:
    """exact: float32. rounded, base: bits of bfloat16 (brain), or of the dtype of which `values` has every value."""
    changed, left, effect, error = 0, 0, 0.0, 0.0
    for i in range(exact.size):
        if brain:
            new = np.uint32(rounded[i] << np.uint32(16)).view(np.float32)
            old = np.uint32(base[i] << np.uint32(16)).view(np.float32)
        else:
            new, old = values[rounded[i]], values[base[i]]
        change, off = exact[i] - old, new - exact[i]
        effect += np.float64(change) * np.float64(change)
        error += np.float64(off) * np.float64(off)
        changed += change != 0
        left += (change != 0) & (new == old)
    return changed, left, effect, error


@cache
def _values(dtype: torch.dtype) -> Any:
    """(65536,) float32: what all patterns of 16 bits stand for."""
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype).float().numpy()


def takes(exact: Tensor, rounded: Tensor, base: Tensor) -> bool:
    """Whether `measure` can: blocks on the CPU in the same order, of float32 and two bytes each."""
    return (
        exact.dtype == torch.float32
        and rounded.dtype == base.dtype
        and rounded.dtype in (torch.bfloat16, torch.float16)
        and all(each.device.type == "cpu" and each.is_contiguous() for each in (exact, rounded, base))
    )


def measure(exact: Tensor, rounded: Tensor, base: Tensor) -> tuple[int, int, float, float]:
    """How many entries change, how many of them rounding left alone, and squared norms of the change and the error."""
    bits = [each.detach().view(-1).view(torch.uint16).numpy() for each in (rounded, base)]
    brain = rounded.dtype == torch.bfloat16
    changed, left, effect, error = _measure(exact.detach().view(-1).numpy(), *bits, brain, _values(rounded.dtype))
    return int(changed), int(left), float(effect), float(error)  # numpy's own where numba is told not to compile
