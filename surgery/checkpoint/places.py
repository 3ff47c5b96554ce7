"""A transformed model that lies in files, read a place at a time: its structure is here, its numbers are lent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.checkpoint.header import read_header
from surgery.checkpoint.inventory import inventory, put
from surgery.checkpoint.load import base, replay
from surgery.checkpoint.manifest import Manifest
from surgery.checkpoint.source import Source
from surgery.graph.blank import blank, empty_out, lent

if TYPE_CHECKING:
    from torch import nn


class Places:
    """model: without numbers, on the meta device or emptied out. key: a tensor's first name to the one in the files."""

    def __init__(self, model: nn.Module, source: Source, key: Callable[[str], str]) -> None:
        self.model, self.source = model, source
        self.keys: dict[str, str] = {}
        for held in inventory(model).values():
            if held.tensor.is_meta:
                put(held, blank(held.tensor))
            self.keys.update({name: key(held.name) for name in held.names})

    @contextmanager
    def at(self, path: str) -> Iterator[nn.Module]:
        """Inside, the module at a path and all in it have their numbers."""
        module = self.model.get_submodule(path)
        stores = (module.named_parameters(), module.named_buffers())
        names = [f"{path}.{name}".lstrip(".") for store in stores for name, _ in store]
        with lent(self.model, {name: self.source.read(self.keys[name]) for name in names if name in self.keys}):
            yield module


def places(directory: Path, manifest: Manifest) -> Places:
    """Of what `surgery apply` wrote; its source is to be closed. Errors: those of `load`."""
    model = base(directory, manifest).model
    empty_out(model)
    replay(model, manifest, shaped=manifest.shape == "config")
    files = sorted({entry.file for entry in manifest.tensors.values()})
    source = Source(read_header(directory / file) for file in files)
    return Places(model, source, lambda name: manifest.tensors[name].key or name)
