"""numba's compiler (the extra `fast`). What it compiled is kept on the disk, where there is a folder for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def available() -> bool:
    """Whether numba can be used: one that does not fit the numpy beside it is there, but cannot be imported."""
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    return True


def jit(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """As `numba.njit`, with its options."""
    import numba

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            made: Callable[..., Any] = numba.njit(cache=True, **options)(function)
        except RuntimeError:  # neither the package's folder nor the user's can be written to
            made = numba.njit(**options)(function)
        return made

    return compiled
