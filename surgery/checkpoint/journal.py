"""What a run has done so far, line by line on the disk: a line is written when what it tells of is safe."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Journal:
    """A file whose first line is the fingerprint of a run; each other one tells of work that is done.

    done: what the other lines say. A line that was cut off says nothing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fingerprint: dict[str, Any] | None = None
        self.done: list[dict[str, Any]] = []
        self._valid = 0
        self._file: int | None = None
        data = path.read_bytes() if path.exists() else b""
        for line in data.splitlines(keepends=True):
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                entry = None
            if not isinstance(entry, dict):
                break
            self._valid += len(line)
            if self.fingerprint is None:
                self.fingerprint = entry
            else:
                self.done.append(entry)

    @property
    def begun(self) -> bool:
        """Whether a run has left something to go on with."""
        return self.fingerprint is not None

    @property
    def units(self) -> set[int]:
        """The units of work that are done."""
        return {unit for line in self.done for unit in line["units"]}

    def differs(self, fingerprint: Mapping[str, object]) -> list[str]:
        """What is another one in the run that was begun, in words."""
        mine = json.loads(json.dumps(fingerprint))
        theirs = self.fingerprint or {}
        return [f"another {name}" for name in mine if theirs.get(name) != mine[name]]

    @contextmanager
    def opened(self, fingerprint: Mapping[str, object]) -> Iterator[None]:
        """Inside, lines can be added."""
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            os.ftruncate(self._file, self._valid)
            os.lseek(self._file, 0, os.SEEK_END)
            if not self.begun:
                self.add(fingerprint)
            yield
        finally:
            os.close(self._file)
            self._file = None

    def add(self, entry: Mapping[str, object]) -> None:
        """One more line, on the disk when this returns."""
        assert self._file is not None
        data = json.dumps(entry).encode() + b"\n"
        while data:
            data = data[os.write(self._file, data) :]
        os.fsync(self._file)
