"""Models whose tensors are there by name, shape and dtype only, and are lent their numbers a few at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def blank(tensor: Tensor) -> Tensor:
    """A CPU tensor of the same shape and dtype that takes no memory. Whoever reads it finds what is no number."""
    value = torch.nan if tensor.is_floating_point() else 0
    return torch.full((1,) * tensor.dim(), value, dtype=tensor.dtype).expand(tensor.shape)


def empty_out(model: nn.Module) -> None:
    """Let go of the numbers of all parameters and persistent buffers; ties stay, and other buffers keep theirs."""
    for module in model.modules():
        held: dict[str, Tensor | None] = {**module._parameters, **module._buffers}
        for name, tensor in held.items():
            if tensor is not None and name not in module._non_persistent_buffers_set:
                tensor.data = blank(tensor)


@contextmanager
def lent(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, these parameters and buffers of a model, by full name, have their numbers."""
    held = [(_tensor(model, name), value) for name, value in tensors.items()]
    try:
        for tensor, value in held:
            tensor.data = value
        yield
    finally:
        for tensor, value in held:
            tensor.data = blank(value)


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, local = name.rpartition(".")
    module = model.get_submodule(path)
    tensor = module._parameters[local] if local in module._parameters else module._buffers[local]
    assert tensor is not None
    return tensor
