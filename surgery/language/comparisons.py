"""Comparisons as written, `< 200 MB`, `<= 1.05 of base`, to values of an option that takes one."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

from surgery.errors import ProgramError
from surgery.language.source import Span
from surgery.language.suggest import did_you_mean, listed
from surgery.language.tree import Literal, Selection, Word
from surgery.language.values import Limits, convert, moved
from surgery.language.wording import expected, sample
from surgery.operations.options import SIZES, Comparison, Form, Option

WORDS = 4
"""How many items may follow a relation: bound, unit, `of`, `base`."""
MOST = 1e6  # no result is that many times its base


def length(first: Literal, following: Sequence[Selection], named: Container[str]) -> int:
    """How many of the items that follow belong to the comparison, right or wrong. named: words that options have."""
    taken = int(first.form == "compare" and _is_bound(following[:1], named))
    if _word(following[taken : taken + 1]) in _units():
        taken += 1
    if _word(following[taken : taken + 1]) == "of":
        taken += 1 + int(_is_bound(following[taken + 1 : taken + 2], named))
    return taken


def read(
    first: Literal, following: Sequence[Selection], option: Option, verb: str, values: Mapping[str, Word | Literal]
) -> tuple[Comparison, Span]:
    """The comparison that starts with an item, and its place. values: of `let` names.

    Raises ProgramError: S012 for something else than a comparison or its bound, S013 out of range, S014 half of one.
    """
    if first.form != "compare":
        said = f"{verb} compares, and '{first.text}' alone is no comparison"
        raise ProgramError.of("S012", said, first.span, f"expected {expected(option)}", f"write `{sample(option)}`")
    bound = following[0] if following else None
    said_before = values.get(bound.text) if isinstance(bound, Word) else None
    if bound is not None and isinstance(said_before, Literal):
        bound = moved(said_before, bound.span)
    if not isinstance(bound, Literal):
        raise ProgramError.of("S014", f"'{first.text}' has no bound", first.span, f"expected {expected(option)}")
    rest, stop = following[1:], bound.span.stop
    unit = of = ""
    if _word(rest) in SIZES:
        unit, stop, rest = _word(rest), rest[0].span.stop, rest[1:]
    elif _word(rest) in _units():
        raise ProgramError.of(
            "S012", f"'{_word(rest)}' is no unit of a size", rest[0].span, did_you_mean(_word(rest), SIZES),
            f"units are {listed(SIZES, 'and')}: 1 MB is a million bytes",
        )  # fmt: skip
    if _word(rest) == "of":
        of, stop = _of(rest, option, verb), rest[1].span.stop
    forms: tuple[Form, ...] = ("number", "share") if of else option.bounds
    if bool(unit) != (forms == ("size",)):
        said = f"{bound.text} {unit}".strip()
        raise ProgramError.of(
            "S012", f"{verb} cannot be compared with {said}", bound.span, f"expected {expected(option)}",
            f"write `{first.text} {bound.text} MB`" if "size" in forms and bound.form == "number" else "",
        )  # fmt: skip
    forms = ("number",) if unit else forms
    limits = Limits(f"the bound of {verb}", forms, at_least=0, at_most=MOST if of else None)
    value = float(convert(bound, limits, None))
    unit = "%" if bound.form == "percent" else unit
    return Comparison(first.text, value, unit, of), Span(first.span.source, first.span.start, stop)


def _of(rest: Sequence[Selection], option: Option, verb: str) -> str:
    """What the bound is a multiple of."""
    of = _word(rest[1:])
    if not option.of:
        raise ProgramError.of("S011", f"{verb} is compared with nothing else", rest[0].span, "leave it out")
    if of not in option.of:
        place = rest[1].span if of else rest[0].span
        raise ProgramError.of(
            "S012", "of what?", place, f"expected `of {listed(option.of)}`", did_you_mean(of, option.of)
        )
    return of


def _word(items: Sequence[Selection]) -> str:
    return items[0].text if items and isinstance(items[0], Word) else ""


def _is_bound(items: Sequence[Selection], named: Container[str]) -> bool:
    """Whether an item is what a comparison would take next, and no option of its own."""
    return bool(items) and (
        isinstance(items[0], Literal) or (_word(items) not in ("", "of") and _word(items) not in named)
    )


def _units() -> set[str]:
    """Also what others measure in, to say so."""
    spelt = (*SIZES, "B", *(f"{unit[0]}iB" for unit in SIZES))
    return {word for unit in spelt for word in (unit, unit.lower(), unit.upper())}
