"""A 4-bit encoder with bitsandbytes' bytes, many times as fast on a CPU: each block is scaled and coded while in cache.

Needs numba (the extra `fast`). Codes are compared with the midpoints of neighbouring levels, as bitsandbytes does.
"""

from __future__ import annotations

from threading import Lock
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from surgery.graph.jit import jit

TINY = np.float32(1e-38)  # bitsandbytes' stand-in for the scale of an empty block
RUN = 1024  # blocks that one thread takes at a time
_TURN = Lock()  # one of numba's thread pools must not be entered twice


@jit(parallel=True)
def _encode(bits: Any, half: bool, bounds: Any, order: Any, block: int, packed: Any, absmax: Any) -> None:
    """bits: of whole blocks of bfloat16 (half) or float32 values. packed, absmax: written."""
    plain = True
    for k in range(order.size):
        plain &= order[k] == k
    for run in numba.prange((absmax.size + RUN - 1) // RUN):
        raw = np.empty(block, np.uint32)
        scaled = raw.view(np.float32)
        index = np.empty(block, np.int32)
        scale = np.empty(1, np.uint32)
        for row in range(run * RUN, min((run + 1) * RUN, absmax.size)):
            start = row * block
            for j in range(block):
                raw[j] = np.uint32(bits[start + j]) << np.uint32(16) if half else np.uint32(bits[start + j])
            largest = np.uint32(0)  # absolute values are in the order of their bits, and what is no number comes last
            for j in range(block):
                largest = max(largest, raw[j] & np.uint32(0x7FFFFFFF))
            scale[0] = largest
            absmax[row] = scale.view(np.float32)[0]
            factor = np.float32(1) / max(absmax[row], TINY)
            for j in range(block):
                scaled[j] *= factor
                index[j] = 0
            for bound in bounds:
                for j in range(block):
                    index[j] += not scaled[j] <= bound
            for j in range(block // 2):
                high, low = index[2 * j], index[2 * j + 1]
                packed[start // 2 + j] = high << 4 | low if plain else order[high] << 4 | order[low]


def encode_blocks(weight: Tensor, levels: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Packed codes (numel / 2, 1) uint8 and scales (numel / block,) float32 of a CPU weight of whole blocks.

    levels: (16,) float32, what each code stands for.
    """
    half = weight.dtype == torch.bfloat16
    flat = (weight if half else weight.float()).detach().contiguous().view(-1)
    rising, order = levels.sort(stable=True)
    bounds = (rising[1:] + rising[:-1]) / 2
    packed = torch.empty((flat.numel() // 2, 1), dtype=torch.uint8)
    absmax = torch.empty(flat.numel() // block, dtype=torch.float32)
    bits = flat.view(torch.uint16 if half else torch.uint32).numpy()
    codes = order.to(torch.uint8).numpy()
    threads = torch.get_num_threads()
    with _TURN:
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        _encode(bits, half, bounds.numpy(), codes, block, packed.view(-1).numpy(), absmax.numpy())
    if torch.get_num_threads() != threads:  # a pool of OpenMP that numba starts sets its size for torch as well
        torch.set_num_threads(threads)
    return packed, absmax
