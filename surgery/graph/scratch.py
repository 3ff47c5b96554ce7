"""Memory that a thread uses again: the pages of fresh memory cost more time than what is computed in them."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

MOST = 1 << 26  # bytes that a thread keeps; larger tensors are rare, and are given back
ALIGNED = 64  # bytes


class _Scratch(threading.local):
    """memory: kept from block to block, `used` of it taken in this one; `wanted` is what all of this one would take."""

    memory: Tensor | None = None
    used = wanted = 0
    open = False


_OWN = _Scratch()


@contextmanager
def reused() -> Iterator[None]:
    """Inside, what `empty` gives lies where the thread's last such block had it; it must not outlive the block.

    A block inside another one is part of it.
    """
    if _OWN.open:
        yield
        return
    _OWN.open, _OWN.used, _OWN.wanted = True, 0, 0
    try:
        yield
    finally:
        _OWN.open = False
        held = 0 if _OWN.memory is None else _OWN.memory.numel()
        if held < _OWN.wanted <= MOST:
            _OWN.memory = None  # before the larger one is there
            with torch.inference_mode(False):  # it is written to in any mode later
                _OWN.memory = torch.empty(_OWN.wanted, dtype=torch.uint8, device="cpu")


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """As `torch.empty`, on the CPU whatever the default; inside `reused` it may take memory of the thread's own."""
    size = math.prod(shape) * dtype.itemsize
    begin, memory = _OWN.used, _OWN.memory
    _OWN.wanted += size + -size % ALIGNED
    if not _OWN.open or memory is None or not size or begin + size > memory.numel():
        return torch.empty(shape, dtype=dtype, device="cpu")
    _OWN.used = begin + size + -size % ALIGNED
    return memory[begin : begin + size].view(dtype).view(tuple(shape))
