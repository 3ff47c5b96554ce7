"""Work on a directory's tensors, unit by unit: by threads, with what is done in a journal, and the rest on a rerun."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Protocol

from surgery.checkpoint.journal import Journal
from surgery.checkpoint.sink import Sink

THREADS = 2  # units at a time: one computes while the other reads or writes
PAUSE = 1.0  # seconds between two lines of the journal, at least


class Worker(Protocol):
    """Does units of work, in any order; those done by different workers may share files.

    units: how many there are. do: carries one out and gives the names that it wrote.
    """

    units: int

    def do(self, unit: int, sink: Sink) -> Sequence[str]: ...


def work_through(worker: Worker, sink: Sink, journal: Journal) -> None:
    """Do every unit that the journal does not have. Lines are added as units are done and on the disk."""
    left = set(range(worker.units))
    for line in journal.done:
        left -= set(line["units"])
        sink.digests.update(line["digests"])
        sink.late.update({name: said.encode() for name, said in line["late"].items()})
    with ThreadPoolExecutor(THREADS) as pool:
        _commit(_done(pool, sorted(left), lambda unit: worker.do(unit, sink)), sink, journal)


def _done(
    pool: ThreadPoolExecutor, units: Sequence[int], do: Callable[[int], Sequence[str]]
) -> Iterator[tuple[int, Sequence[str]]]:
    """Units as they are done, with what each wrote; few are begun ahead, for each holds memory."""
    waiting = iter(units)
    running: dict[Future[Sequence[str]], int] = {}
    try:
        while True:
            for unit in waiting:
                running[pool.submit(do, unit)] = unit
                if len(running) >= THREADS:
                    break
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    finally:
        for future in running:
            future.cancel()


def _commit(done: Iterator[tuple[int, Sequence[str]]], sink: Sink, journal: Journal) -> None:
    units: list[int] = []
    names: list[str] = []
    last = time.monotonic()

    def write() -> None:
        sink.sync()
        digests = {name: sink.digests[name] for name in names if name in sink.digests}
        late = {name: sink.late[name].decode() for name in names if name in sink.late}
        journal.add({"units": units, "digests": digests, "late": late})

    for unit, wrote in done:
        units.append(unit)
        names.extend(wrote)
        if time.monotonic() - last > PAUSE:
            write()
            units, names, last = [], [], time.monotonic()
    if units:
        write()
