"""Models whose tensors are there by name, shape and dtype only, and are lent their numbers a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

LENDER = "_surgery_lender"


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


def at_hand(model: nn.Module, path: str) -> AbstractContextManager[None]:
    """Inside, the module at a path and all in it have their numbers; nothing to do for a model that has all of them."""
    lender: Lender | None = model.__dict__.get(LENDER)
    return nullcontext() if lender is None else lender.at_hand(path)


@contextmanager
def lending(model: nn.Module, layers: Sequence[str], read: Callable[[str], Tensor]) -> Iterator[None]:
    """Inside, a model without numbers can run: what runs has its own, of these layers one at a time.

    layers: paths of modules that get what is in them at once. read: a tensor by its full name.
    """
    lender = Lender(model, layers, read)
    model.__dict__[LENDER] = lender
    try:
        yield
    finally:
        del model.__dict__[LENDER]
        lender.close()


class Lender:
    """Lends modules their numbers for as long as they run, or are at hand."""

    def __init__(self, model: nn.Module, layers: Sequence[str], read: Callable[[str], Tensor]) -> None:
        self.model, self.layers, self.read = model, frozenset(layers), read
        self.running: dict[str, tuple[str, ...]] = {}
        self.pinned: set[str] = set()
        self.handles: list[Any] = []
        inside = tuple(f"{path}." for path in layers)
        for path, module in model.named_modules():
            if path in self.layers or not path.startswith(inside):
                names = self._names(path, module, path in self.layers)
                if names:
                    self._watch(path, module, names)

    def _names(self, path: str, module: nn.Module, whole: bool) -> tuple[str, ...]:
        """Full names of what a module needs to run, its children included where it is lent as a `whole`."""
        found = []
        for below, each in module.named_modules() if whole else (("", module),):
            held: dict[str, Tensor | None] = {**each._parameters, **each._buffers}
            where = ".".join(filter(None, (path, below)))
            found += [
                f"{where}.{name}".lstrip(".")
                for name, tensor in held.items()
                if tensor is not None and name not in each._non_persistent_buffers_set
            ]
        return tuple(found)

    def _watch(self, path: str, module: nn.Module, names: tuple[str, ...]) -> None:
        def before(module: nn.Module, args: Any) -> None:
            self._lend(path, names)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if path not in self.pinned:
                self._take_back(path)

        self.handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    @contextmanager
    def at_hand(self, path: str) -> Iterator[None]:
        """See `at_hand` of this file."""
        if path in self.pinned or any(path.startswith(f"{layer}.") for layer in self.pinned):
            yield
            return
        self._lend(path, self._names(path, self.model.get_submodule(path), True))
        self.pinned.add(path)
        try:
            yield
        finally:
            self.pinned.discard(path)
            self._take_back(path)

    def close(self) -> None:
        """Take back what is still lent, and watch no more."""
        for handle in self.handles:
            handle.remove()
        for path in list(self.running):
            self._take_back(path)

    def _lend(self, path: str, names: tuple[str, ...]) -> None:
        if path in self.layers:  # one that was left in the middle has not given back what it had
            for other in self.layers & self.running.keys() - self.pinned - {path}:
                self._take_back(other)
        if path not in self.running:
            self.running[path] = names
            for name in names:
                _tensor(self.model, name).data = self.read(name)

    def _take_back(self, path: str) -> None:
        for name in self.running.pop(path, ()):
            tensor = _tensor(self.model, name)
            tensor.data = blank(tensor)


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, local = name.rpartition(".")
    module = model.get_submodule(path)
    tensor = module._parameters[local] if local in module._parameters else module._buffers[local]
    assert tensor is not None
    return tensor
