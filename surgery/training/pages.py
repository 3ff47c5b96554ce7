"""Optimizer state in a memory-mapped file: the kernel writes it out under pressure and fetches it when it is used."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 64
STATE: Mapping[str, tuple[str, ...]] = {"AdamW": ("exp_avg", "exp_avg_sq"), "Adam": ("exp_avg", "exp_avg_sq")}
"""What torch's optimizers keep for each parameter, beside a step count."""


class Pages:
    """Tensors of zeros in a file of the temporary directory (TMPDIR), which is gone when the last of them is.

    The file has no name as soon as it is mapped, so that nothing is left behind even by a killed process.
    """

    def __init__(self, size: int) -> None:
        self.size, self.used = max(size, ALIGNMENT), 0
        self.memory = _mapped(self.size)

    def zeros(self, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of zeros with a shape, as `torch.zeros_like`; dtype: the same unless given."""
        dtype = dtype or like.dtype
        count = like.numel() * dtype.itemsize
        if self.used + count > len(self.memory):
            self.memory, self.used = _mapped(max(count, ALIGNMENT)), 0
        part = self.memory[self.used : self.used + count]
        self.used += -(-count // ALIGNMENT) * ALIGNMENT
        return part.view(dtype).view(like.shape)


def _mapped(size: int) -> Tensor:
    """(size,) uint8 zeros, shared with a file that takes no room where it was not written to."""
    with tempfile.TemporaryDirectory(prefix="surgery-", ignore_cleanup_errors=True) as directory:
        return torch.from_file(str(Path(directory) / "state"), shared=True, size=size, dtype=torch.uint8)


def page(optimizer: Any) -> Any:
    """Keep the state of a fresh optimizer, torch's AdamW or Adam or one of bitsandbytes', in such a file.

    Nothing else changes: the arithmetic is the optimizer's own, and its state dict can be loaded with and without.
    """
    parameters: list[Tensor] = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    if hasattr(optimizer, "get_state_buffer"):  # bitsandbytes asks for its buffers one by one
        pages = Pages(sum(_room(tensor, 4) for tensor in parameters))
        optimizer.get_state_buffer = lambda p, dtype=torch.float32: pages.zeros(p, dtype)
        optimizer.load_state_dict = partial(_load, optimizer.load_state_dict, optimizer, pages)
        return optimizer
    pages = Pages(sum(_room(tensor, tensor.dtype.itemsize) for tensor in parameters))
    for tensor in parameters:
        # What the first step would make, so that it is not made in memory first.
        optimizer.state[tensor] = {
            "step": torch.tensor(
                0.0, dtype=torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
            ),
            **{name: pages.zeros(tensor) for name in STATE[type(optimizer).__name__]},
        }
    optimizer.load_state_dict = partial(_load, optimizer.load_state_dict, optimizer, None)
    return optimizer


def _room(tensor: Tensor, itemsize: int) -> int:
    """Bytes for two tensors of that shape."""
    return 2 * (-(-tensor.numel() * itemsize // ALIGNMENT) * ALIGNMENT)


def _load(original: Callable[..., Any], optimizer: Any, pages: Pages | None, state_dict: Any, *args: Any) -> None:
    """Load a state dict into the mapped tensors; those that it brings are in memory."""
    before = {id(p): dict(state) for p, state in optimizer.state.items()}
    original(state_dict, *args)
    for p, state in optimizer.state.items():
        for name, value in state.items():
            if not isinstance(value, Tensor) or value.shape != p.shape or value.numel() < 1 or name == "step":
                continue
            held = before.get(id(p), {}).get(name)
            if held is None or held.dtype != value.dtype:
                held = pages.zeros(value) if pages is not None else None
            if held is not None:
                state[name] = held.copy_(value)
