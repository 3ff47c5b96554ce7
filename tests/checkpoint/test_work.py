"""Units handed to a pool of threads, and what an interrupt finds of them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from surgery.checkpoint import work


class Interrupted(ThreadPoolExecutor):
    """Ctrl-C comes as the second unit is handed out."""

    given = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.given += 1
        if self.given == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return super().submit(fn, *args, **kwargs)


def test_an_interrupt_waits_until_all_units_are_handed_out() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Interrupted(2) as pool:
            with pytest.raises(KeyboardInterrupt):
                list(work._done(pool, range(50), lambda unit: [str(unit)]))
            assert pool.given == 50
            assert pool.submit(lambda: 7).result(timeout=20) == 7, "its locks are free"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_one_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupted(2) as pool:
            done = dict(work._done(pool, range(50), lambda unit: [str(unit)]))
        assert done == {unit: [str(unit)] for unit in range(50)}
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_nothing_is_held_back() -> None:
    found: list[Any] = []

    def run() -> None:
        with ThreadPoolExecutor(2) as pool:
            found.extend(sorted(work._done(pool, range(5), lambda unit: [str(unit)])))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [(unit, [str(unit)]) for unit in range(5)]


def test_what_fails_is_raised_and_the_rest_is_not_begun() -> None:
    began: list[int] = []

    def fails(unit: int) -> list[str]:
        began.append(unit)
        raise ValueError(unit)

    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="0"):
        list(work._done(pool, range(200), fails))
    assert 0 in began
