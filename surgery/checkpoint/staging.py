"""Directories appear whole or not at all: written aside, synced, renamed; nothing stays behind after a failure.

What is written aside lies in `.NAME.partial` beside NAME. A process that is killed leaves it there; the next run to the
same place goes on with it, where it keeps a journal, and clears it away otherwise.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from surgery.checkpoint.journal import Journal
from surgery.errors import CheckpointError

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None  # type: ignore[assignment]

# What may be replaced on request: only directories that hold a model.
MODEL_FILES = ("surgery.json", "config.json")
EXCHANGE, HERE = 2, -100  # of renameat2: RENAME_EXCHANGE, AT_FDCWD


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

    Errors: those of `check_target`; S431 when the system refuses a write, S433 when the disk is full, S434 when a run
    that was killed could still be finished, S435 when another process writes there.
    """
    with _aside(target, force) as place:
        out = place / "out"
        journal = Journal(place / "journal")
        if journal.begun:
            raise _unfinished(place, "a run that keeps a journal, and this one keeps none")
        _clear(place)
        out.mkdir(mode=0o777)
        yield out
        _publish(place, _absolute(target), force)


@contextmanager
def resumed(
    target: Path, fingerprint: Mapping[str, object], size: int, force: bool = False
) -> Iterator[tuple[Path, Journal]]:
    """As `staged`, with a journal: where a process was killed, the next one finds what that had done.

    fingerprint: what the result depends on; a run that had another is not gone on with. size: bytes to be written.
    Errors: those of `staged`; S433 also when there is less space than that, before anything is written.
    """
    with _aside(target, force) as place:
        out, journal = place / "out", Journal(place / "journal")
        if journal.begun and (other := journal.differs(fingerprint)):
            raise _unfinished(place, f"a run of {' and '.join(other)}")
        if not journal.begun:
            _clear(place)
            out.mkdir(mode=0o777)
        _check_space(place, _absolute(target), size)
        with journal.opened(fingerprint):
            _sync(place)
            yield out, journal
        _publish(place, _absolute(target), force)


def sync_all(directory: Path) -> None:
    """Flush a directory and all in it to the disk."""
    for path in (*directory.rglob("*"), directory):
        _sync(path)


@contextmanager
def _aside(target: Path, force: bool) -> Iterator[Path]:
    """`.NAME.partial`, held by this process alone; gone afterwards."""
    target = _absolute(target)
    check_target(target, force)
    place = target.parent / f".{target.name}.partial"
    with _told(target):
        lock = _hold(place, target)
    keep = False
    try:
        with _told(target):
            replaced = place / "replaced"
            if replaced.exists() and not target.exists():
                replaced.rename(target)  # killed between two renames
                check_target(target, force)
            yield place
    except CheckpointError as error:
        keep = error.diagnostics[0].code == "S434"
        raise
    finally:
        if not keep:
            with suppress(OSError):
                _clear(place)
                (place / "lock").unlink()  # last: whoever gets it from here on finds nothing of ours
                place.rmdir()
        os.close(lock)


def _hold(place: Path, target: Path) -> int:
    """A file that is locked as long as this process lives. Errors: S435 when another one has locked it."""
    while True:
        place.mkdir(mode=0o777, exist_ok=True)
        try:
            lock = os.open(place / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # removed by the process that was just done
            continue
        if fcntl is None:
            return lock
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock).st_ino == (place / "lock").stat().st_ino:
                return lock
        except BlockingIOError:
            os.close(lock)
            raise CheckpointError.of(
                "S435", f"another process is writing `{target}`", help="wait for it, or choose another name"
            ) from None
        except FileNotFoundError:
            pass
        os.close(lock)


def _clear(place: Path) -> None:
    """Remove what a process has left there that was killed."""
    for path in place.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def _check_space(place: Path, target: Path, size: int) -> None:
    held = sum(path.stat().st_blocks * 512 for path in place.rglob("*") if path.is_file())
    free = shutil.disk_usage(place).free
    if size - held > free:
        raise CheckpointError.of(
            "S433",
            f"`{target}` takes {size / 1e9:.2f} GB, and {(free + held) / 1e9:.2f} GB are free; nothing was written",
            help="free some space, or write elsewhere",
        )


def _unfinished(place: Path, what: str) -> CheckpointError:
    return CheckpointError.of(
        "S434",
        f"`{place}` is what a killed process left: {what}",
        help=f"run that again to finish it, or give it up: rm -r {place}",
    )


def _publish(place: Path, target: Path, force: bool) -> None:
    """Let what was written aside appear, all of it being on the disk."""
    out = place / "out"
    out.chmod(0o777 & ~_umask())
    sync_all(out)
    # Killed from here on, what lies aside is over: it is not to be gone on with, for it may be what was replaced.
    (place / "journal").unlink(missing_ok=True)
    _sync(place)
    _put(out, target, force)
    _sync(target.parent)


def _put(out: Path, target: Path, force: bool) -> None:
    """Rename; what is replaced changes places with it, in one step where the system can."""
    if not force or not target.exists():
        check_target(target)  # somebody may have made it meanwhile
        out.rename(target)
        return
    if _exchange(out, target):
        return
    replaced = out.parent / "replaced"
    target.rename(replaced)
    try:
        out.rename(target)
    except BaseException:
        replaced.rename(target)
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Give two directories each other's name at once; false where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return bool(rename(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE) == 0)


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
