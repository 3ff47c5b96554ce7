"""Files of a known layout, filled tensor by tensor in any order, by any number of threads and processes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.checkpoint.handles import Handles
from surgery.checkpoint.layout import FileLayout
from surgery.checkpoint.tensors import Tell, silent
from surgery.graph.digest import Digest, bytes_of, digest

if TYPE_CHECKING:
    from torch import Tensor

    from surgery.checkpoint.source import Source


class Sink(Handles[str]):
    """The files of a directory, open for writing.

    digests: of what was written so far, by name, where they are `wanted`. late: what was given of the late ones.
    notes: what a report will say of what was written, by name, as JSON.
    """

    def __init__(
        self, directory: Path, files: Sequence[FileLayout], *, wanted: bool = True, tell: Tell = silent
    ) -> None:
        super().__init__()
        self.directory, self.files, self.wanted, self.tell = directory, tuple(files), wanted, tell
        self.digests: dict[str, str] = {}
        self.late: dict[str, bytes] = {}
        self.notes: dict[str, Any] = {}
        self.home: dict[str, str] = {slot.name: file.name for file in files for slot in file.slots}
        self._places = {name: (file.name, place) for file in files for name, place in file.places().items()}
        for file in files:
            self.open(file.name, directory / file.name, os.O_RDWR | os.O_CREAT)

    def write(self, values: Mapping[str, Tensor | bytes]) -> list[str]:
        """Write tensors; bytes are what is late. Gives their names."""
        for name, value in values.items():
            if isinstance(value, bytes):
                self.late[name] = value
            else:
                self.put(name, value)
        return list(values)

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, in row-major order."""
        data = bytes_of(tensor)
        if self.wanted:
            self.digests[name] = digest(data)
        self._write(name, data, 0)

    def copy(self, name: str, source: Source, key: str, held: Digest | None = None) -> None:
        """Write a tensor of a source as it lies there, never all of it in memory. held: takes its digest, too."""
        mine = Digest() if self.wanted else None
        for at, data in source.stretches(key):
            for one in (mine, held):
                if one is not None:
                    one.update(data)
            self._write(name, data, at)
        if mine is not None:
            self.digests[name] = mine.text

    def note(self, name: str, tensor: Tensor) -> None:
        """Take the digest of a tensor that lies elsewhere and is not written."""
        data = bytes_of(tensor)
        self.digests[name] = digest(data)
        self.tell(len(data))

    def note_copy(self, name: str, source: Source, key: str, held: Digest | None = None) -> None:
        """As `note`, of a tensor of a source, never all of it in memory. held: as of `copy`."""
        mine = Digest()
        for _, data in source.stretches(key):
            for one in (mine, held):
                if one is not None:
                    one.update(data)
            self.tell(len(data))
        self.digests[name] = mine.text

    def sync(self) -> None:
        """Flush what was written to the disk."""
        for handle in self._open.values():
            os.fsync(handle)

    def finish(self) -> None:
        """Write headers and what is late; each file ends where its data ends. The files are not synced."""
        for file in self.files:
            late = {slot.name: self.late[slot.name] for slot in file.slots if slot.late}
            handle = self._open[file.name]
            place = file.size - sum(slot.bytes for slot in file.slots if slot.late)
            tail = b"".join(late.values())
            write_all(handle, memoryview(tail), place)
            os.ftruncate(handle, place + len(tail))
            write_all(handle, memoryview(file.head({name: len(data) for name, data in late.items()})), 0)

    def _write(self, name: str, data: memoryview, at: int) -> None:
        file, place = self._places[name]
        write_all(self._open[file], data, place + at)
        self.tell(len(data))


def write_all(handle: int, data: memoryview, place: int) -> None:
    """Write all of some bytes at a place of a file."""
    while len(data):
        count = os.pwrite(handle, data, place)
        data, place = data[count:], place + count


def fill(directory: Path, files: Sequence[FileLayout], tensors: Mapping[str, Tensor | bytes], tell: Tell) -> Sink:
    """Write every tensor of some files, all of them being in memory; bytes are what is late."""
    with Sink(directory, files, tell=tell) as sink:
        sink.write(tensors)
        sink.finish()
    return sink
