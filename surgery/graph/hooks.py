"""Taking hooks of ours away from a model's modules, whatever was said when they were set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

STORES = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


def drop(model: nn.Module, unwanted: Callable[[Any], bool]) -> None:
    """Remove every forward hook and pre-hook, at any depth, for which `unwanted` holds."""
    for module in model.modules():
        for key, hook in [*module._forward_pre_hooks.items(), *module._forward_hooks.items()]:
            if unwanted(hook):
                for store in STORES:
                    getattr(module, store).pop(key, None)
