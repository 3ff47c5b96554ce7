"""Side-by-side timing: contenders take turns within one run, so that a busy machine slows all of them alike."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def keep_pages() -> bool:
    """Let the C library keep freed memory, where it is glibc; true if it agreed.

    By default it may return and fetch the pages of a large tensor (logits, say) at every step, which takes longer than
    many a product; whether it does hangs on what else lies on the heap, so on the order of the contenders.
    """
    trim_threshold, mmap_threshold, top_pad = -1, -3, -2
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return all([mallopt(mmap_threshold, 2**30), mallopt(trim_threshold, 2**31 - 1), mallopt(top_pad, 2**28)])


def alternate(contenders: dict[str, Callable[[], object]], rounds: int, warm: int = 2) -> dict[str, list[float]]:
    """Seconds of each contender in each round. The order turns by one every round."""
    names = list(contenders)
    for name in names * warm:
        contenders[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                start = time.perf_counter()
                contenders[name]()
                seconds[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, against: str) -> float:
    """Median over rounds of the ratio within a round: drifts of the machine cancel."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[against], strict=True))


def table(title: str, seconds: dict[str, list[float]], limits: dict[tuple[str, str], float]) -> bool:
    """Print medians, then each ratio with its limit; true when all are within."""
    print(f"\n{title}")
    for name, values in seconds.items():
        print(f"  {name:<10} {1e3 * statistics.median(values):9.1f} ms   (best {1e3 * min(values):.1f})")
    good = True
    for (name, against), limit in limits.items():
        if name in seconds and against in seconds:
            value = ratio(seconds, name, against)
            good &= value <= limit
            print(f"  {name} / {against} = {value:.3f}   limit {limit:.2f}   {'ok' if value <= limit else 'OVER'}")
    return good


def peak(function: Callable[..., object], *args: Any) -> int:
    """Bytes of the largest resident set of a fresh process that runs `function(*args)`."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_report_peak, args=(send, function, args))
    process.start()
    send.close()
    try:
        result: int = receive.recv()
    except EOFError:
        raise RuntimeError(f"{function.__name__}{args} died") from None
    finally:
        process.join()
    return result


def _report_peak(send: Any, function: Callable[..., object], args: tuple[Any, ...]) -> None:
    function(*args)
    send.send(high_water())


def high_water() -> int:
    """Bytes of this process's largest resident set so far. (`getrusage` would inherit the parent's on Linux.)"""
    status = Path("/proc/self/status")
    if not status.exists():
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
