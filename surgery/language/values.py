"""Values as written to values of an option's type, with its range checked."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from surgery.errors import Diagnostic, ProgramError
from surgery.language.source import Span
from surgery.language.texts import decode
from surgery.language.tree import Literal
from surgery.operations.options import Form, Option, Payload, Ratio

WHOLE = re.compile(r"-?\d+")
LONGEST = 40
MOST = 2**31 - 1  # of what is counted
TABLES: dict[Form, Form] = {"counts": "count", "numbers": "number"}
WANTED: dict[Form, str] = {
    "count": "a whole number, such as 8",
    "counts": "one for each layer, such as 4, 8, 16",
    "numbers": "one for each layer, such as 8, 8, 16",
    "number": "a number, such as 0.5 or 2e-4",
    "share": "a percentage, such as 5%",
    "ratio": "a ratio, such as 2:4",
    "word": "a word",
    "text": "a quoted text",
    "file": "a quoted path",
    "variant": "a word",
    "selection": "a selector, such as attn.q",
    "flag": "nothing",
    "size": "a size, such as 200 MB",
    "comparison": "a comparison, such as < 1%",
}


@dataclass(frozen=True)
class Limits:
    """What a value must be: its forms, its range, the name to complain with."""

    name: str
    forms: tuple[Form, ...]
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    @classmethod
    def of(cls, name: str, limits: Option | Payload) -> Limits:
        forms = limits.forms if isinstance(limits, Option) else (limits.form,)
        return cls(name, forms, limits.at_least, limits.above, limits.at_most, limits.below)


def wanted(forms: tuple[Form, ...]) -> str:
    """`a percentage, such as 5%, or a ratio, such as 2:4`."""
    return ", or ".join(WANTED[form] for form in forms)


def convert(literal: Literal, limits: Limits, directory: Path | None) -> Any:
    """The value. Raises ProgramError: S012 when it is of another type, S013 when it is out of range."""
    if literal.form == "table":
        return _table(literal, limits, directory)
    if len(literal.text) > LONGEST and literal.form != "text":
        raise ProgramError.of("S013", f"a number of {len(literal.text)} characters", literal.span, "too long")
    if literal.form in ("number", "percent") and _absurd(literal.text):
        raise _too_large(literal, limits)
    for form in limits.forms:
        value = _value(form, literal, directory)
        if value is not None:
            if form == "count" and value > MOST:
                raise _too_large(literal, limits)
            _check(value, form, literal, limits)
            return value
    raise ProgramError(
        Diagnostic(
            "S012",
            f"{limits.name} cannot be {_shown(literal)}",
            literal.span,
            f"expected {wanted(limits.forms)}",
            _rewritten(literal, limits.forms),
        )
    )


def _table(literal: Literal, limits: Limits, directory: Path | None) -> tuple[Any, ...]:
    """Every entry for itself, all of the same type."""
    single: tuple[Form, ...] = tuple(TABLES[form] for form in limits.forms if form in TABLES)
    if not single:
        raise ProgramError.of(
            "S012", f"{limits.name} cannot be a table", literal.span, f"expected {wanted(limits.forms)}"
        )
    entries = (Literal("number", text, literal.span) for text in literal.text.split(", "))
    return tuple(convert(entry, replace(limits, forms=single), directory) for entry in entries)


def moved(literal: Literal, span: Span) -> Literal:
    """The value of a `let`, complained about where it is used."""
    return literal if literal.span is span else Literal(literal.form, literal.text, span)


def percent(share: float) -> str:
    """0.05 as `5%`, exactly: what is printed is read back to the same bits."""
    exact = Decimal(repr(share)) * 100
    text = plain(exact)
    return f"{text if len(text) <= 24 else f'{exact:e}'}%"


def plain(number: Decimal) -> str:
    """Without exponent and without needless zeros."""
    text = f"{number:f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) or "0"


def _too_large(literal: Literal, limits: Limits) -> ProgramError:
    said = "no value of that size is meant"
    return ProgramError.of("S013", f"{limits.name} cannot be {literal.text}", literal.span, said)


def _absurd(text: str) -> bool:
    """Beyond what a float can be, or so many digits in the exponent that arithmetic on it would not end."""
    exponent = re.search(r"[eE][+-]?(\d+)", text)
    return exponent is not None and (len(exponent[1]) > 3 or not math.isfinite(float(text.rstrip("%"))))


def _value(form: Form, literal: Literal, directory: Path | None) -> Any:
    text = literal.text
    if form == "count" and literal.form == "number" and WHOLE.fullmatch(text):
        return int(text)
    if form == "number" and literal.form == "number" and math.isfinite(float(text)):
        return float(text)
    if form == "share" and literal.form == "percent":
        return float(Decimal(text[:-1]) / 100)
    if form == "ratio" and literal.form == "ratio":
        part, _, whole = text.partition(":")
        return Ratio(int(part), int(whole))
    if form == "text" and literal.form == "text":
        return decode(literal)
    if form == "file" and literal.form == "text":
        path = Path(decode(literal))
        return path if directory is None else directory.absolute() / path
    return None


def _check(value: Any, form: Form, literal: Literal, limits: Limits) -> None:
    if isinstance(value, Ratio):
        if not 0 < value.part < value.whole:
            raise ProgramError.of(
                "S013",
                f"{limits.name} cannot be {value}",
                literal.span,
                "expected fewer than the whole, and at least one, as 2:4",
            )
        return
    if form in ("text", "file"):
        if not str(value):
            raise ProgramError.of("S013", f"{limits.name} cannot be empty", literal.span, f"expected {WANTED[form]}")
        return
    share = form == "share"
    low = limits.at_least if limits.at_least is not None or limits.above is not None or not share else 0.0
    high = limits.at_most if limits.at_most is not None or limits.below is not None or not share else 1.0
    bounds = [
        (low, "at least", low is None or value >= low),
        (limits.above, "more than", limits.above is None or value > limits.above),
        (high, "at most", high is None or value <= high),
        (limits.below, "less than", limits.below is None or value < limits.below),
    ]
    broken = [f"{said} {number_text(bound, share)}" for bound, said, holds in bounds if not holds and bound is not None]
    if broken:
        said = " and ".join(f"{said} {number_text(bound, share)}" for bound, said, _ in bounds if bound is not None)
        raise ProgramError.of("S013", f"{limits.name} cannot be {literal.text}", literal.span, f"must be {said}")


def number_text(value: float, share: bool = False) -> str:
    """A number as written in a program: `16`, `0.5`, `2e-4`; a share as a percentage."""
    if share:
        return percent(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return re.sub(r"e([+-])0*(\d)", lambda match: "e" + match[1].replace("+", "") + match[2], repr(value))


def _rewritten(literal: Literal, forms: tuple[Form, ...]) -> str:
    """The same value in a form that would be taken, where there is a plain one."""
    if literal.form in ("number", "percent") and "e" in literal.text.lower() and "count" not in forms:
        return ""
    if literal.form == "number" and "share" in forms:
        number = Decimal(literal.text)
        return f"write {plain(number * 100 if abs(number) < 1 else number)}%"
    if literal.form == "percent" and "number" in forms:
        return f"write {plain(Decimal(literal.text[:-1]) / 100)}"
    if literal.form == "number" and "count" in forms and abs(float(literal.text)) < 1e15:
        return f"write {round(float(literal.text))}"
    if literal.form != "text" and ("text" in forms or "file" in forms):
        return f'write "{literal.text}"'
    return ""


def _shown(literal: Literal) -> str:
    return literal.text if len(literal.text) <= LONGEST else f"{literal.text[: LONGEST - 3]}..."
