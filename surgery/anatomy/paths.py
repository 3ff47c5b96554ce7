"""Paths of modules: `layers.0.attn` lies within `layers.0`, and everything within the model, whose path is empty."""

from __future__ import annotations

from collections.abc import Iterator


def within(path: str, outer: str) -> bool:
    """Whether a module is another one or inside it."""
    return outer in ("", path) or path.startswith(f"{outer}.")


def outward(path: str) -> Iterator[str]:
    """A path and those of the modules around it, the innermost first; the model itself is left out."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def common(*paths: str) -> str:
    """The innermost module that all of these are within; it may be one of them."""
    shared = []
    for names in zip(*(path.split(".") for path in paths), strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)


def depth(path: str) -> int:
    """How many modules down a path leads."""
    return len(path.split(".")) if path else 0


def moved(path: str, before: str, after: str) -> str:
    """Where a module is to be found when what was at one path is at another: where it was, if it is not within that."""
    return after + path[len(before) :] if within(path, before) else path
