"""Statements that cannot both hold: each names what it takes for itself at a part, and two must not take the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from surgery.anatomy.parts import Part
from surgery.errors import Diagnostic
from surgery.language.pairs import stacks

if TYPE_CHECKING:
    from surgery.compiler.plan import Step

MODEL = Part("model", "block", "the model", "")
"""Where a statement acts that acts on no part."""


def conflicts(steps: Sequence[Step]) -> tuple[Diagnostic, ...]:
    """One diagnostic for each pair of statements that claim the same at one place, naming both and the first place."""
    holders: dict[tuple[str, str, str], list[tuple[int, Part]]] = {}
    found: dict[tuple[int, int], Diagnostic] = {}
    for index, step in enumerate(steps):
        for part in step.parts if step.operation.acts_on else (MODEL,):
            for claim in step.operation.claims(step.statement.name):
                held = holders.setdefault((part.path, part.parameter, claim), [])
                for other, place in held:
                    if other != index and (other, index) not in found and overlap(place, part):
                        found[other, index] = _diagnostic(steps[other], step, part, claim)
                held.append((index, part))
    return tuple(found.values())


def _whatever_their_names(first: Step, second: Step) -> bool:
    """Whether two statements would still take the same under names of their own."""
    names = ("one", "another")
    claims = (step.operation.claims(name) for step, name in zip((first, second), names, strict=True))
    return not set(next(claims)).isdisjoint(next(claims))


def overlap(a: Part, b: Part) -> bool:
    """Whether two parts of one tensor have a channel in common."""
    if a.kind != b.kind:
        return False
    if a.channels is None or b.channels is None:
        return True
    return any(start < until and begin < stop for start, stop in a.channels for begin, until in b.channels)


def _diagnostic(first: Step, second: Step, part: Part, claim: str) -> Diagnostic:
    same_adapter = first.operation.verb == second.operation.verb and first.operation.phase == "attach"
    new, old = (first, second) if second.standing else (second, first)
    where = "of the program before" if old.standing else f"at {old.statement.span}"
    return Diagnostic(
        "S103",
        f"`{first.statement}` and `{second.statement}` both act on {part.place}",
        new.statement.span,
        label=f"the other statement is {where}; both take its {claim}",
        help=(
            "keep one of them"
            if part is MODEL
            else first.operation.beside_another
            if same_adapter and (stacks(first.operation) or not _whatever_their_names(first, second))
            else "leave the place out of one with `except`"
        ),
    )
