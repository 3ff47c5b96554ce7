"""Directories appear whole or not at all: written aside, synced, renamed; nothing stays behind after a failure."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from surgery.errors import CheckpointError

# What may be replaced on request: only directories that hold a model.
MODEL_FILES = ("surgery.json", "config.json")


def check_target(target: Path, force: bool = False) -> None:
    """Refuse early, before any work is done: S430 exists, S431 cannot be made, S432 no model to replace."""
    target = _absolute(target)
    if target.is_symlink() or target.exists():
        if not force:
            raise CheckpointError.of("S430", f"`{target}` exists", help="another name, or --force to replace it")
        empty = target.is_dir() and not any(target.iterdir())
        if target.is_symlink() or not (empty or any((target / name).is_file() for name in MODEL_FILES)):
            raise CheckpointError.of(
                "S432",
                f"`{target}` does not hold a model, so --force will not replace it",
                help="remove it yourself, or choose another name",
            )
    if not target.parent.is_dir():
        raise CheckpointError.of(
            "S431", f"`{target.parent}` is not a directory", help="make it first, or choose another place"
        )
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise CheckpointError.of("S431", f"no permission to write in `{target.parent}`")


@contextmanager
def staged(target: Path, force: bool = False) -> Iterator[Path]:
    """A directory to write into, which becomes `target` when the block ends well and vanishes otherwise.

    Errors: those of `check_target`; S431 when the system refuses a write, S433 when the disk is full.
    """
    target = _absolute(target)
    check_target(target, force)
    with _told(target):
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        with _told(target):
            yield partial
            partial.chmod(0o777 & ~_umask())
            for path in (*partial.rglob("*"), partial):
                _sync(path)
            _put(partial, target, force)
            _sync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put(partial: Path, target: Path, force: bool) -> None:
    """Rename; what is replaced is set aside first and comes back when that fails."""
    if not force or not target.exists():
        check_target(target)  # somebody may have made it meanwhile
        partial.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    try:
        target.rename(old / "replaced")
        try:
            partial.rename(target)
        except BaseException:
            (old / "replaced").rename(target)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _told(target: Path) -> Iterator[None]:
    """The system's refusals as our errors."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError.of(
                "S433", f"no space left for `{target}`; nothing was written", help="free some space, or write elsewhere"
            ) from error
        raise CheckpointError.of("S431", f"cannot write `{target}`: {error.strerror or error}") from error


def _sync(path: Path) -> None:
    """Flush a file or directory to the disk; some systems cannot do so for directories, where it does not matter."""
    with suppress(OSError) if path.is_dir() else nullcontext():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    current = os.umask(0o077)
    os.umask(current)
    return current


def _absolute(path: Path) -> Path:
    """Without `.` and a trailing slash, symbolic links kept: `out/` and `./out` are `out`."""
    return Path(os.path.abspath(path.expanduser()))
