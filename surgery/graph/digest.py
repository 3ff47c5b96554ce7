"""The one digest that tensors are known by: BLAKE3, 128 bits, hexadecimal. BLAKE2b takes five times as long."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from blake3 import blake3

if TYPE_CHECKING:
    from torch import Tensor

BYTES = 16


class Digest:
    """Of bytes that come one after the other. former: BLAKE2b, by which manifests up to format 2 know their tensors."""

    def __init__(self, former: bool = False) -> None:
        self._hash = hashlib.blake2b(digest_size=BYTES) if former else blake3()

    def update(self, data: memoryview | bytes) -> None:
        self._hash.update(data)

    @property
    def text(self) -> str:
        return self._hash.hexdigest()[: 2 * BYTES]


def digest(value: Tensor | memoryview | bytes, former: bool = False) -> str:
    """Of bytes, those of a tensor in row-major order. former: as of `Digest`."""
    found = Digest(former)
    found.update(bytes_of(value) if isinstance(value, torch.Tensor) else value)
    return found.text


def bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's memory where it is contiguous on the CPU, a copy otherwise."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(bytearray())
