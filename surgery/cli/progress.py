"""What is being done and how far it is, on stderr, for what takes longer than a second; silent when piped."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE = 1.0  # seconds before anything is shown


@contextmanager
def progress(title: str, total: Callable[[], int] | None = None) -> Iterator[Callable[[int], object]]:
    """A bar (a spinner where the total is not known) while the block runs; tell it the amount done since last time.

    total: asked for only where a bar will be shown.
    """
    if not sys.stderr.isatty():
        yield lambda amount: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()]
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(title, total=total() if total else None)
    timer = threading.Timer(PATIENCE, bar.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda amount: bar.update(task, advance=amount)
    finally:
        timer.cancel()
        timer.join()
        bar.stop()
