"""Fingerprints of tensors: enough to tell whether somebody wrote to one, and cheap on large ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

WHOLE = 1 << 16
"""Tensors up to so many numbers are read whole, of larger ones as many are read, evenly spread."""


def fingerprint(tensor: Tensor) -> str:
    """Of dtype, shape and bits; `meta` where there are none."""
    if tensor.is_meta:
        return "meta"
    flat = tensor.detach().reshape(-1)
    if flat.numel() > WHOLE:
        flat = flat[:: flat.numel() // WHOLE]
    data = flat.contiguous().cpu().view(torch.uint8) if flat.numel() else flat
    digest = hashlib.blake2b(data.numpy().tobytes() if data.numel() else b"", digest_size=16)
    digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    return digest.hexdigest()


def fingerprints(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, str]:
    """Of parameters and buffers by name; `names` picks some."""
    wanted = None if names is None else set(names)
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: fingerprint(tensor) for name, tensor in held.items() if wanted is None or name in wanted}


def changed(before: Mapping[str, str], model: nn.Module) -> tuple[str, ...]:
    """Names whose bits are others now, or that are gone."""
    now = fingerprints(model, before)
    return tuple(name for name, print_ in before.items() if now.get(name) != print_)
