"""Tensors of files by name, read one at a time with pread: nothing is mapped, and what was read can be forgotten."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.checkpoint.handles import Handles
from surgery.checkpoint.header import Header, TensorInfo
from surgery.checkpoint.tensors import DTYPES
from surgery.errors import CheckpointError
from surgery.graph import scratch
from surgery.graph.digest import bytes_of, digest

if TYPE_CHECKING:
    from torch import Tensor
STRETCH = 1 << 19  # bytes copied at a time: what a processor's cache holds between reading, hashing and writing


class Source(Handles[Path]):
    """The tensors of some files, open for reading by any number of threads."""

    def __init__(self, headers: Iterable[Header]) -> None:
        super().__init__()
        self.infos: dict[str, TensorInfo] = {}
        self._files: dict[str, Path] = {}
        for header in headers:
            self.open(header.path, header.path, os.O_RDONLY)
            for info in header.tensors:
                self.infos[info.name] = info
                self._files[info.name] = header.path

    def fingerprint(self) -> dict[str, object]:
        """What there is to read, by names, sizes, times and headers, and who reads it."""
        from surgery import __version__

        files = []
        for path, handle in sorted(self._open.items()):
            status = os.fstat(handle)
            begin = os.pread(handle, 8 + int.from_bytes(os.pread(handle, 8, 0), "little"), 0)
            files.append([str(path), status.st_size, status.st_mtime_ns, digest(begin)])
        return {"source": files, "version": __version__}

    def __contains__(self, name: str) -> bool:
        return name in self.infos

    def read(self, name: str) -> Tensor:
        """A tensor on the CPU. Errors: S411 truncated since its header was read, S412 a dtype that torch lacks."""
        info, path = self.infos[name], self._files[name]
        if info.dtype not in DTYPES:
            raise CheckpointError.of("S412", f"`{path}`: {name} has dtype {info.dtype}, which is not supported")
        tensor = scratch.empty(info.shape, DTYPES[info.dtype])
        self._read_into(name, bytes_of(tensor), 0)
        return tensor

    def stretches(self, name: str) -> Iterator[tuple[int, memoryview]]:
        """A tensor's bytes, a stretch at a time, each with its place in the tensor. The memory is used again."""
        info = self.infos[name]
        size = info.stop - info.start
        held = memoryview(bytearray(min(STRETCH, size)))
        for at in range(0, size, STRETCH):
            data = held[: min(STRETCH, size - at)]
            self._read_into(name, data, at)
            yield at, data

    def _read_into(self, name: str, data: memoryview, at: int) -> None:
        place, path = self.infos[name].start + at, self._files[name]
        while len(data):
            count = os.preadv(self._open[path], [data], place)
            if not count:
                raise CheckpointError.of("S411", f"`{path}` is truncated inside {name}")
            data, place = data[count:], place + count
