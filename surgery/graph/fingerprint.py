"""Fingerprints of tensors: enough to tell whether somebody wrote to one, and cheap on large ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from surgery.graph.digest import digest

WHOLE = 1 << 16
"""Tensors up to so many numbers are read whole, of larger ones as many are read, evenly spread."""


def fingerprint(tensor: Tensor) -> str:
    """Dtype, shape, and a digest of the bits; `meta` where there are none."""
    if tensor.is_meta:
        return "meta"
    flat = tensor.detach().reshape(-1)
    if flat.numel() > WHOLE:
        flat = flat[:: flat.numel() // WHOLE]
    return f"{tensor.dtype} {tuple(tensor.shape)} {digest(flat)}"


def fingerprints(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, str]:
    """Of parameters and buffers by name; `names` picks some."""
    wanted = None if names is None else set(names)
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: fingerprint(tensor) for name, tensor in held.items() if wanted is None or name in wanted}


def changed(before: Mapping[str, str], model: nn.Module) -> tuple[str, ...]:
    """Names whose bits are others now, or that are gone. A tensor that was cast to another dtype is not compared."""
    now = fingerprints(model, before)
    return tuple(name for name, old in before.items() if _differs(old, now.get(name)))


def _differs(old: str, new: str | None) -> bool:
    return new is None or (new != old and new.partition(" ")[0] == old.partition(" ")[0])
