"""Optimizer state in a memory-mapped file: the kernel writes it out under pressure and fetches it when it is used."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 20
"""Bytes of a file that small tensors of one dtype share; larger ones than a sixteenth of it have a file each."""
STATE: Mapping[str, tuple[str, ...]] = {"AdamW": ("exp_avg", "exp_avg_sq"), "Adam": ("exp_avg", "exp_avg_sq")}
"""What torch's optimizers keep for each parameter, beside a step count."""


class Pages:
    """Tensors of zeros in files of the temporary directory (TMPDIR), which are gone when the last of them is.

    A file has no name as soon as it is mapped, so that nothing is left behind even by a killed process.
    """

    def __init__(self) -> None:
        self.chunks: dict[torch.dtype, Tensor] = {}

    def zeros(self, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of zeros with a shape, as `torch.zeros_like`; dtype: the same unless given."""
        dtype = dtype or like.dtype
        count = like.numel()
        if count * dtype.itemsize > CHUNK // 16:
            return _mapped(count, dtype).view(like.shape)
        chunk = self.chunks.get(dtype)
        if chunk is None or len(chunk) < count:
            chunk = _mapped(CHUNK // dtype.itemsize, dtype)
        self.chunks[dtype] = chunk[count:]
        return chunk[:count].view(like.shape)


def _mapped(count: int, dtype: torch.dtype) -> Tensor:
    """(count,) zeros, shared with a file that takes no room where it was not written to."""
    with tempfile.TemporaryDirectory(prefix="surgery-", ignore_cleanup_errors=True) as directory:
        return torch.from_file(str(Path(directory) / "state"), shared=True, size=count, dtype=dtype)


def page(optimizer: Any) -> Any:
    """Keep the state of a fresh optimizer, torch's AdamW or Adam or one of bitsandbytes', in such a file.

    Nothing else changes: the arithmetic is the optimizer's own, and its state dict can be loaded with and without.
    """
    pages = Pages()
    optimizer.load_state_dict = partial(_load, optimizer.load_state_dict, optimizer, pages)
    if hasattr(optimizer, "get_state_buffer"):  # bitsandbytes asks for its buffers when it needs them
        optimizer.get_state_buffer = lambda p, dtype=torch.float32: pages.zeros(p, dtype)
        return optimizer
    for tensor in (tensor for group in optimizer.param_groups for tensor in group["params"]):
        # What the first step would make, so that it is not made in memory first.
        wide = torch.get_default_dtype() == torch.float64
        step = torch.tensor(0.0, dtype=torch.float64 if wide else torch.float32)
        names = STATE[type(optimizer).__name__]
        optimizer.state[tensor] = {"step": step, **{name: pages.zeros(tensor) for name in names}}
    return optimizer


def _load(original: Callable[..., Any], optimizer: Any, pages: Pages, state_dict: Any, *args: Any) -> None:
    """Load a state dict into mapped tensors; those that it brings may be in memory, or another optimizer's."""
    original(state_dict, *args)
    for tensor, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == tensor.shape and name != "step":
                state[name] = pages.zeros(value).copy_(value)
