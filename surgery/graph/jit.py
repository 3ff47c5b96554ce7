"""numba's compiler (the extra `fast`). What it compiled is kept on the disk, where there is a folder for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def jit(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """As `numba.njit`, with its options."""

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            made: Callable[..., Any] = numba.njit(cache=True, **options)(function)
        except RuntimeError:  # neither the package's folder nor the user's can be written to
            made = numba.njit(**options)(function)
        return made

    return compiled
