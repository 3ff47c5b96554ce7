"""Where every tensor of a directory will lie, known from shapes alone: shards, reserved headers and offsets.

So files can be laid out before there is any number in them, and filled in any order, by several processes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from surgery.checkpoint.header import INDEX, WIDTHS, checkpoint_files
from surgery.checkpoint.manifest import ADDED, BASE
from surgery.errors import CheckpointError

SHARD = 5 * 10**9  # bytes of tensors in a file, where the source does not say otherwise
METADATA = {"format": "pt"}


@dataclass(frozen=True)
class Slot:
    """A tensor to be written: its name in the file, dtype as the format spells it, shape.

    group: what has the same one lies in one file. late: a string of bytes whose length, at most `shape[0]`, is known
    when it is there; it comes after everything else.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    group: str = ""
    late: bool = False

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * WIDTHS[self.dtype] // 8


@dataclass(frozen=True)
class FileLayout:
    """One file: its name, slots in the order of their data, and the bytes that its header takes."""

    name: str
    slots: tuple[Slot, ...]
    begin: int

    @property
    def size(self) -> int:
        """At most so many bytes."""
        return self.begin + sum(slot.bytes for slot in self.slots)

    def places(self) -> dict[str, int]:
        """First byte in the file of everything that is not late."""
        found, place = {}, self.begin
        for slot in self.slots:
            if not slot.late:
                found[slot.name] = place
                place += slot.bytes
        return found

    def head(self, late: Mapping[str, int]) -> bytes:
        """The file's first bytes. late: the lengths of what is late."""
        slots = [replace(slot, shape=(late[slot.name],)) if slot.late else slot for slot in self.slots]
        text = _header(slots)
        return (self.begin - 8).to_bytes(8, "little") + text + b" " * (self.begin - 8 - len(text))


def layout(name: str, slots: Iterable[Slot]) -> FileLayout:
    """One file of these tensors. Wider dtypes come first, so that data is aligned."""
    order = tuple(sorted(slots, key=lambda slot: (slot.late, -WIDTHS[slot.dtype], slot.name)))
    length = len(_header(order))
    return FileLayout(name, order, 8 + length + -length % 8)


def shards(slots: Sequence[Slot], most: int = SHARD) -> tuple[FileLayout, ...]:
    """`model.safetensors`, or shards of at most so many bytes of tensors in the order of the slots.

    A group is never divided, so one that is larger has a shard to itself.
    """
    groups: dict[str, list[Slot]] = {}
    for slot in slots:
        groups.setdefault(slot.group or slot.name, []).append(slot)
    files: list[list[Slot]] = [[]]
    room = most
    for group in groups.values():
        size = sum(slot.bytes for slot in group)
        if size > room and files[-1]:
            files.append([])
            room = most
        files[-1] += group
        room -= size
    if len(files) == 1:
        return (layout(BASE, files[0]),)
    count = len(files)
    return tuple(layout(f"model-{i:05}-of-{count:05}.safetensors", file) for i, file in enumerate(files, start=1))


def shard_size(source: Path | None) -> int:
    """How large the shards of a result are: as the largest of the source's, where it has several."""
    try:
        sizes = [path.stat().st_size for path in checkpoint_files(source)] if source is not None else []
    except (CheckpointError, OSError):
        return SHARD
    return max(sizes) if len(sizes) > 1 else max(SHARD, *sizes, 0)


def write_index(directory: Path, files: Sequence[FileLayout]) -> None:
    """`model.safetensors.index.json`, where there are several shards."""
    weights = [file for file in files if file.name != ADDED]
    if len(weights) > 1:
        total = sum(slot.bytes for file in weights for slot in file.slots if not slot.late)
        names = {slot.name: file.name for file in weights for slot in file.slots}
        data = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
        (directory / INDEX).write_text(json.dumps(data, indent=2) + "\n", "utf-8")


def _header(slots: Iterable[Slot]) -> bytes:
    header: dict[str, object] = {"__metadata__": METADATA}
    place = 0
    for slot in slots:
        header[slot.name] = {
            "dtype": slot.dtype,
            "shape": list(slot.shape),
            "data_offsets": [place, place + slot.bytes],
        }
        place += slot.bytes
    return json.dumps(header, separators=(",", ":")).encode()
