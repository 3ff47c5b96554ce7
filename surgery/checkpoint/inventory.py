"""Every tensor of a model once: its names, the modules that hold it, and whether a program put it there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass
class Held:
    """A parameter or buffer. Where several names mean one tensor (ties), `names` has them all, the first one first.

    places: (module, name in it) of every holder, replaced originals included.
    added: a program put it there. persistent: a state dict has it.
    """

    tensor: Tensor
    names: list[str] = field(default_factory=list)
    places: list[tuple[nn.Module, str]] = field(default_factory=list)
    added: bool = False
    persistent: bool = False
    parameter: bool = False

    @property
    def name(self) -> str:
        return self.names[0]


def inventory(model: nn.Module) -> dict[str, Held]:
    """Tensors by their first name, in the model's order."""
    found: dict[int, Held] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        added = set(getattr(module, "added", ()))
        for local, tensor in _own(module):
            held = found.setdefault(id(tensor), Held(tensor))
            held.names.append(f"{path}.{local}" if path else local)
            held.places.append((module, local))
            held.added |= local in added or any(path_added(path, model))
            held.parameter |= local in module._parameters
            held.persistent |= local not in module._non_persistent_buffers_set
    for module in _originals(model):
        for local, tensor in _own(module):
            if id(tensor) in found:
                found[id(tensor)].places.append((module, local))
    return {held.name: held for held in found.values()}


def path_added(path: str, model: nn.Module) -> Iterator[bool]:
    """Whether some ancestor was put there by a program, from the root down."""
    module = model
    for name in path.split(".") if path else ():
        yield name in getattr(module, "added", ())
        module = module._modules[name]  # type: ignore[assignment]


def put(held: Held, tensor: Tensor) -> None:
    """Give every holder this tensor's data, keeping ties; the parameter stays the same object where it can."""
    from torch import nn

    old = held.tensor
    if old.device == tensor.device and old.dtype == tensor.dtype:
        old.data = tensor
        return
    new: Tensor = tensor if old.is_meta else tensor.to(old.device)
    if held.parameter:
        new = nn.Parameter(new, requires_grad=old.requires_grad and new.is_floating_point())
    for module, local in held.places:
        store = module._parameters if local in module._parameters else module._buffers
        store[local] = new  # type: ignore[assignment]
    held.tensor = new


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for store in (module._parameters, module._buffers):
        for local, tensor in store.items():
            if tensor is not None:
                yield local, tensor


def _originals(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        original = getattr(module, "original", None)
        if original is not None and "original" not in module._modules:
            yield from original.modules()
