"""What every layer computes alike from shared parameters, computed once in a forward pass of the model.

Autograd then runs back through it once, too: gradients are taken of the pass as a whole, not layer by layer. A value
lives from the first layer that asks to the end of the pass, so it is never part of two passes. Where autograd keeps a
layer's tensors in its own way (gradient checkpoints, offloading) or a compiler traces, and outside a pass of the model,
each layer computes it for itself.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.anatomy.entries import callable_at
from surgery.anatomy.paths import common
from surgery.graph.hooks import drop
from surgery.graph.module import Rewritten

_HELD = threading.local()  # in `values`: id of a shared parameter -> circumstances -> the value


def tanh_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """tanh(x W^T + b), (rows, out)."""
    if torch.compiler.is_compiling() or _kept_elsewhere():
        return torch.tanh(F.linear(x, weight, bias))
    held = getattr(_HELD, "values", {}).get(id(x), {})
    kind = x.device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    versions = tuple(0 if each.is_inference() else each._version for each in (x, weight, bias))
    now = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), cast, versions)
    if now not in held:
        held[now] = torch.tanh(F.linear(x, weight, bias))
    return held[now]  # type: ignore[no-any-return]


def _kept_elsewhere() -> bool:
    """Whether saved tensors go through hooks: those of a checkpoint count them, and find fewer where one is shared."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(True) is not None


class Opens:
    """A forward pre-hook of the module that holds all layers: a pass begins.

    holder, name: a layer's rewritten place, and what it calls the shared parameter: loading puts others in their place.
    """

    def __init__(self, holder: nn.Module, name: str) -> None:
        self.holder, self.name = holder, name

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            _HELD.__dict__.setdefault("values", {})[id(self.holder.get_parameter(self.name))] = {}


class Closes(Opens):
    """Its forward hook: the pass ends, by an exception too; one that was interrupted ends when the next one begins."""

    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> None:
        if not torch.compiler.is_compiling():
            _HELD.__dict__.setdefault("values", {}).clear()


def install(model: nn.Module) -> None:
    """Let a pass begin and end at the innermost module above all layers that share. Repeat it after every change."""
    drop(model, lambda hook: isinstance(hook, Opens))
    sharing: dict[int, list[tuple[str, Rewritten, str]]] = {}
    for path, module in model.named_modules():
        for name in _asked(module):
            sharing.setdefault(id(module.get_parameter(name)), []).append((path, module, name))
    for places in sharing.values():
        if len(places) > 1:
            above = model.get_submodule(callable_at(model, common(*(path for path, *_ in places))))
            _, holder, name = places[0]
            above.register_forward_pre_hook(Opens(holder, name))
            above.register_forward_hook(Closes(holder, name), always_call=True)


def _asked(module: nn.Module) -> Iterator[str]:
    """The parameters that a module computes a shared value from."""
    if isinstance(module, Rewritten):
        for node in module.full.nodes:
            if node.target is tanh_linear:
                yield str(node.all_input_nodes[0].target)
