"""Which two statements may act on one place, from what each claims there: the table of pairs in the reference."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Literal

from surgery.anatomy.parts import Part
from surgery.language.program import Statement
from surgery.operations.base import Operation
from surgery.operations.forms import FORMS

Verdict = Literal["+", "as", "-"]
NAME = "second"
LINEAR = Part("linear", "projection", "place")


@dataclass(frozen=True)
class Pair:
    """`+`: legal. `as`: legal when one of them has a name. `-`: never. reason: why not, or why not without a name."""

    verdict: Verdict
    reason: str = ""


def statements(verbs: Collection[str]) -> list[Statement]:
    """The main forms of these verbs, without names."""
    from surgery.language.load import parse

    return [parse(text).statements[0] for verb in sorted(FORMS) if verb in verbs for text in FORMS[verb]]


def pair(one: Statement, other: Statement) -> Pair:
    """Whether two statements may stand in one program, as far as they meet."""
    if not _meet(one, other):
        return Pair("+")
    for first, second in ((one, other), (other, one)):
        if first.operation.phase == "quantize" and second.operation.trains(LINEAR):
            return Pair("-", "one keeps as codes what the other trains")
        if first.operation.freezes and second.operation.trains(LINEAR):
            return Pair("-", "one takes out all that the other trains")
    common = _common(one, other, None)
    if not common:
        return Pair("+")
    reason = f"both take its {' and its '.join(common)}"
    if one.operation.verb == other.operation.verb and stacks(one.operation):
        return Pair("as", f"{reason}; {one.operation.beside_another}")
    return Pair("-" if _common(one, other, NAME) else "as", reason)


def stacks(operation: Operation) -> bool:
    """Whether a verb has its own way of standing twice on one place."""
    return type(operation).beside_another is not Operation.beside_another


def _meet(one: Statement, other: Statement) -> bool:
    kinds, others = one.operation.acts_on, other.operation.acts_on
    return one.selector == other.selector and (bool(set(kinds) & set(others)) or kinds == others == ())


def _common(one: Statement, other: Statement, name: str | None) -> list[str]:
    claims = other.operation.claims(None)
    return [claim for claim in one.operation.claims(name) if claim in claims]


def table(verbs: Collection[str]) -> str:
    """The table in Markdown, with the reasons below it."""
    rows = statements(verbs)
    numbers = range(1, len(rows) + 1)
    lines = [
        f"| | | {' | '.join(map(str, numbers))} |",
        f"| --- | --- | {' | '.join('---' for _ in rows)} |",
        *(
            f"| {number} | `{row}` | {' | '.join(pair(row, column).verdict for column in rows)} |"
            for number, row in zip(numbers, rows, strict=True)
        ),
    ]
    return "\n".join([*lines, "", *_reasons(rows)])


def _reasons(rows: Sequence[Statement]) -> Iterator[str]:
    found: dict[tuple[str, str], list[str]] = {}
    for (i, one), (j, other) in combinations_with_replacement(enumerate(rows, 1), 2):
        met = pair(one, other)
        if met.reason:
            found.setdefault((met.verdict, met.reason), []).append(f"{i} with {j}")
    for (verdict, reason), pairs in found.items():
        yield f"- `{verdict}` {', '.join(pairs)}: {reason}"
