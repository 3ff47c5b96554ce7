"""Work on a directory's tensors, unit by unit, by threads or processes; a journal tells the next run what is done."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Any, Protocol

import torch

from surgery.checkpoint.journal import Journal
from surgery.checkpoint.layout import FileLayout
from surgery.checkpoint.sink import Sink
from surgery.errors import CheckpointError

THREADS = 2  # units at a time: one computes while the other reads or writes
PAUSE = 0.5  # seconds between two lines of the journal, at least


class Worker(Protocol):
    """Does units of work, in any order; those done by different workers may share files.

    units: how many there are. files: what is written. do: carries one out and gives the names that it wrote.
    """

    units: int

    @property
    def files(self) -> Sequence[FileLayout]: ...

    def do(self, unit: int, sink: Sink) -> Sequence[str]: ...


Make = Callable[[], Worker]  # what can be sent to another process, which makes the same worker of it


def work_through(worker: Worker, sink: Sink, journal: Journal, jobs: int = 1, make: Make | None = None) -> None:
    """Do every unit that the journal does not have. Lines are added as units are done and on the disk.

    jobs: processes to do it, where there are several, each with a worker that it `make`s.
    """
    left = sorted(set(range(worker.units)) - journal.units)
    for line in journal.done:
        sink.digests.update(line["digests"])
        sink.late.update({name: said.encode() for name, said in line["late"].items()})
        sink.notes.update(line["notes"])
    return_pages()
    several = jobs > 1 and make is not None and len(left) > 1
    with ExitStack() as stack:
        stack.enter_context(left_alone())
        if several and make is not None:
            do = stack.enter_context(_elsewhere(min(jobs, len(left)), make, sink))
        else:
            do = lambda unit: worker.do(unit, sink)  # noqa: E731
        threads = min(jobs, len(left)) if several else THREADS
        # As many threads of torch's as the caller has: how many take part in a sum shows in its last bits.
        pool = stack.enter_context(
            ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),))
        )
        _commit(_done(pool, left, do), sink, journal)


def return_pages() -> None:
    """Let the C library, where it is glibc, return freed tensors at once: else each thread keeps some for later."""
    threshold = -3  # M_MMAP_THRESHOLD
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(threshold, 1 << 20)


def trim() -> None:
    """Give back what lies free between other memory, too: else it grows with the number of tensors that went by."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def left_alone() -> Iterator[None]:
    """Inside, garbage is looked for in what is new: all that is there would stop every thread for half a second."""
    mine = not gc.get_freeze_count()
    if mine:
        gc.freeze()
    try:
        yield
    finally:
        if mine:
            gc.unfreeze()


@contextmanager
def _elsewhere(jobs: int, make: Make, sink: Sink) -> Iterator[Callable[[int], Sequence[str]]]:
    """Does a unit in one of several processes, which end with the block, or with this process."""
    context = multiprocessing.get_context("spawn")  # a process that computes with threads cannot be forked
    idle: SimpleQueue[Connection] = SimpleQueue()
    processes = []
    for _ in range(jobs):
        mine, theirs = context.Pipe()
        arguments = (theirs, make, sink.directory, sink.wanted, torch.get_num_threads())
        process = context.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        theirs.close()
        processes.append((process, mine))
        idle.put(mine)

    def do(unit: int) -> Sequence[str]:
        pipe = idle.get()
        pipe.send(unit)
        try:
            done = pipe.recv()
        except EOFError:
            raise CheckpointError.of("S497", "a process of `--jobs` has died, perhaps out of memory") from None
        finally:
            idle.put(pipe)
        if isinstance(done, Exception):
            raise done
        names, digests, late, notes, size = done
        sink.digests.update(digests)
        sink.late.update(late)
        sink.notes.update(notes)
        sink.tell(size)
        return names  # type: ignore[no-any-return]

    try:
        yield do
    finally:
        for process, pipe in processes:
            pipe.close()
            process.join()


def _serve(pipe: Connection, make: Make, directory: Path, wanted: bool, threads: int) -> None:
    """Do the units that come through a pipe, until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other end decides
    torch.set_num_threads(threads)
    return_pages()
    worker, told, last = make(), list[int](), time.monotonic()
    with Sink(directory, worker.files, wanted=wanted, tell=told.append) as sink:
        while True:
            try:
                unit = pipe.recv()
            except EOFError:
                return
            try:
                names = worker.do(unit, sink)
                found = ({name: held[name] for name in names if name in held} for held in _told(sink))
                pipe.send((names, *found, sum(told)))
            except Exception as error:
                pipe.send(error)
            told.clear()
            if time.monotonic() - last > PAUSE:
                trim()
                last = time.monotonic()


def _told(sink: Sink) -> tuple[dict[str, Any], ...]:
    """What is to be known of what was written."""
    return sink.digests, sink.late, sink.notes


def _done(
    pool: ThreadPoolExecutor, units: Sequence[int], do: Callable[[int], Sequence[str]]
) -> Iterator[tuple[int, Sequence[str]]]:
    """Units as they are done, with what each wrote. Those that wait hold no memory yet."""
    running: dict[Future[Sequence[str]], int] = {}
    finished: SimpleQueue[Future[Sequence[str]]] = SimpleQueue()
    try:
        with uninterrupted():
            for unit in units:
                future = pool.submit(do, unit)
                running[future] = unit
                future.add_done_callback(finished.put)
        for _ in units:
            future = finished.get()
            yield running[future], future.result()
    finally:
        for future in running:
            future.cancel()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Inside, Ctrl-C and the like wait for the end: raised while a pool hands out work, they leave its locks locked."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: handler for number, handler in kept.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, lambda *signaled: came.append(signaled))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for signaled, frame in came[:1]:
            handlers[signal.Signals(signaled)](signaled, frame)


def _commit(done: Iterator[tuple[int, Sequence[str]]], sink: Sink, journal: Journal) -> None:
    units: list[int] = []
    names: list[str] = []
    last = time.monotonic()

    def write() -> None:
        sink.sync()
        digests, late, notes = ({name: held[name] for name in names if name in held} for held in _told(sink))
        said = {name: value.decode() for name, value in late.items()}
        journal.add({"units": units, "digests": digests, "late": said, "notes": notes})
        trim()

    for unit, wrote in done:
        units.append(unit)
        names.extend(wrote)
        if time.monotonic() - last > PAUSE:
            write()
            units, names, last = [], [], time.monotonic()
    if units:
        write()
