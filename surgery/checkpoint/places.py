"""A transformed model that lies in files, read a place at a time: its structure is here, its numbers are lent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.checkpoint.base import FOUND, find, headers
from surgery.checkpoint.inventory import inventory, put
from surgery.checkpoint.load import replay, skeleton
from surgery.checkpoint.manifest import Manifest
from surgery.checkpoint.source import Source
from surgery.graph.blank import blank, empty_out, lent

if TYPE_CHECKING:
    from torch import Tensor, nn


class Places:
    """model: without numbers, on the meta device or emptied out. key: a tensor's first name to the one in the files.

    manifest: what holds each tensor to its digest, where there is one.
    """

    def __init__(
        self, model: nn.Module, source: Source, key: Callable[[str], str], manifest: Manifest | None = None
    ) -> None:
        self.model, self.source, self.manifest = model, source, manifest
        self.keys: dict[str, str] = {}
        self.firsts: dict[str, str] = {}
        for held in inventory(model).values():
            if held.tensor.is_meta:
                put(held, blank(held.tensor))
            self.keys.update({name: key(held.name) for name in held.names})
            self.firsts.update(dict.fromkeys(held.names, held.name))

    @contextmanager
    def at(self, path: str) -> Iterator[nn.Module]:
        """Inside, the module at a path and all in it have their numbers."""
        module = self.model.get_submodule(path)
        stores = (module.named_parameters(), module.named_buffers())
        names = [f"{path}.{name}".lstrip(".") for store in stores for name, _ in store]
        with lent(self.model, {name: self._read(name) for name in names if name in self.keys}):
            yield module

    def _read(self, name: str) -> Tensor:
        tensor = self.source.read(self.keys[name])
        if self.manifest is not None:
            self.manifest.check(self.firsts[name], tensor)
        return tensor


def places(directory: Path, manifest: Manifest, base: str | Path | None = None) -> Places:
    """Of what `surgery apply` wrote; its source is to be closed. base and errors: those of `load`."""
    model = skeleton(directory, manifest).model
    empty_out(model)
    replay(model, manifest, shaped=manifest.shape == "config")
    place = find(directory, manifest, base)
    model.__dict__[FOUND] = place
    source = Source(header for _, header in headers(directory, manifest, place))
    return Places(model, source, lambda name: manifest.tensors[name].key or name, manifest)
