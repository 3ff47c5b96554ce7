"""Open files by name, that are closed at the end of a block, or where it never comes to that, with their holder."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from typing_extensions import Self

Name = TypeVar("Name")


class Handles(Generic[Name]):
    """Files that are open. What is made of several may fail halfway: then nobody enters its block."""

    def __init__(self) -> None:
        self._open: dict[Name, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def open(self, name: Name, path: Path, flags: int) -> None:
        """Open one more file."""
        self._open[name] = os.open(path, flags, 0o666)

    def close(self) -> None:
        """Close all files."""
        while self._open:
            os.close(self._open.popitem()[1])
