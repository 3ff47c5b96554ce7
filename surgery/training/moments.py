"""What an optimizer has gathered about single weights, and forgetting it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def bare(optimizer: Any) -> Any:
    """The optimizer inside of what a training library has put around it."""
    inner = getattr(optimizer, "optimizer", None)
    return optimizer if inner is None else bare(inner)


def forget(optimizer: Any, weight: Tensor, keep: Tensor) -> None:
    """Set to zero all that an optimizer holds of the entries of a weight where keep, of its shape, is False.

    Means, squares and momentum buffers of torch's optimizers, and of bitsandbytes' at 32 and at 8 bits: there a zero is
    the code of the table's zero, exactly.
    """
    state = optimizer.state.get(weight, {})
    for name, held in state.items():
        if not isinstance(held, Tensor) or held.shape != weight.shape or not held.dim():
            continue
        zero = 0
        if held.dtype == torch.uint8:
            table = state[name.replace("state", "qmap")]
            zero = int(table.abs().argmin())
        held.masked_fill_(~keep, zero)
