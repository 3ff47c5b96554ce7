"""Statements that stand in a row at one place: each may say by name which one comes next there, and must find it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from surgery.errors import Diagnostic

if TYPE_CHECKING:
    from surgery.compiler.plan import Step


def broken_rows(steps: Sequence[Step]) -> tuple[Diagnostic, ...]:
    """One diagnostic (S110) for each statement whose next one is not there, or is before it as well."""
    rows: dict[tuple[str, str], dict[str, Step]] = {}
    for step in steps:
        for part in step.parts:
            rows.setdefault((step.operation.verb, part.path), {})[step.statement.name or "default"] = step
    found: dict[str, Diagnostic] = {}
    for (verb, path), row in rows.items():
        for name, step in row.items():
            following = step.operation.follower
            text = str(step.statement)
            if following is None or text in found:
                continue
            if following not in row:
                found[text] = _diagnostic(
                    step,
                    f"`{text}` comes before `{following}`, and there is no such {verb} at {path}",
                    f"write `as {following}` behind the one that is meant, or leave this place out with `except`",
                )
            elif _comes_back(name, row):
                found[text] = _diagnostic(
                    step, f"`{text}` comes before `{following}` and after it", "leave `then` out of the last one"
                )
    return tuple(found.values())


def _comes_back(name: str, row: dict[str, Step]) -> bool:
    """Whether the row that starts at a name leads back to it."""
    seen: set[str] = set()
    here: str | None = name
    while here is not None and here in row and here not in seen:
        seen.add(here)
        here = row[here].operation.follower
    return here == name


def _diagnostic(step: Step, message: str, help: str) -> Diagnostic:
    span = step.statement.places.get("then", step.statement.span)
    return Diagnostic("S110", message, span, help=help)
