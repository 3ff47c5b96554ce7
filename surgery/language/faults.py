"""Syntax errors in words: from what the parser found and expected to a diagnostic at its place."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from surgery.errors import Diagnostic
from surgery.language.source import Source, Span
from surgery.language.suggest import did_you_mean, listed

if TYPE_CHECKING:
    from lark import UnexpectedInput

RUN = re.compile(r"[\w.%:+-]+")
KEYWORDS = ("on", "in", "except", "as", "expect")
RESERVED = frozenset((*KEYWORDS, "all", "layers", "let", "include", "surgery", "seed"))


def too_large(span: Span) -> Diagnostic:
    return Diagnostic("S004", "the program is larger than 1 MB", span, help="a program is a page or two of statements")


def too_deep(span: Span) -> Diagnostic:
    return Diagnostic("S005", "parentheses are nested deeper than 64", span)


def too_many(shown: int) -> Diagnostic:
    return Diagnostic("S042", f"there are more errors; these are the first {shown}")


def syntax_fault(error: UnexpectedInput, source: Source, offset: int, text: str) -> Diagnostic:
    """The diagnostic of a statement that cannot be parsed; `text` starts at `offset` of the source."""
    from lark import UnexpectedCharacters, UnexpectedToken

    if isinstance(error, UnexpectedCharacters):
        return _bad_characters(source, offset + (error.pos_in_stream or 0))
    assert isinstance(error, UnexpectedToken)
    expected = set(error.expected)
    start, stop = error.token.start_pos, error.token.end_pos
    if error.token.type in ("$END", "COMMENT") or start is None or stop is None:
        end = offset + (len(text.rstrip()) if error.token.type == "$END" or start is None else start)
        return Diagnostic(
            "S001", "the statement ends too early", Span(source, end, end), f"expected {_wanted(expected)}"
        )
    span = Span(source, offset + start, offset + stop)
    if span.text == '"' or error.token.type == "ERROR":
        return _bad_characters(source, span.start)
    if "ON" in expected and "NUMBER" not in expected:
        return _after_clause(span, expected)
    return Diagnostic("S001", f"unexpected '{_shown(span.text)}'", span, f"expected {_wanted(expected)}")


def _after_clause(span: Span, expected: set[str]) -> Diagnostic:
    guess = did_you_mean(span.text, KEYWORDS)
    before = re.search(r"(\w+)\s*$", span.source.text[: span.start])
    if span.text[:1] in "-0123456789" and before and did_you_mean(before[1], ("layers",)):
        guess = "did you mean `layers` before it?"
    return Diagnostic(
        "S009",
        f"unexpected '{_shown(span.text)}' after the selector",
        span,
        guess or f"expected {_wanted(expected)}",
        "options go before `on`, as in `lora rank 8 on attn.q`; selectors are joined with `+`",
    )


def _bad_characters(source: Source, position: int) -> Diagnostic:
    text = source.text
    if text[position] == '"':
        stop = text.find("\n", position)
        end = len(text) if stop < 0 else stop
        return Diagnostic(
            "S003", "the text has no closing quote", Span(source, position, end), 'expected another " on this line'
        )
    run = RUN.match(text, position)
    span = Span(source, position, run.end() if run else position + 1)
    if run and re.match(r"[-+]?[.\d]", run[0]):
        return Diagnostic(
            "S002", f"'{_shown(run[0])}' is not a number", span, help="numbers are written 8, 0.5, 2e-4, 50% or 2:4"
        )
    if run:
        return Diagnostic(
            "S002",
            f"'{_shown(run[0])}' is not a name",
            span,
            help="names are letters, digits, `_` and dots between them",
        )
    character = text[position]
    shown = f"'{character}'" if character.isprintable() else f"character U+{ord(character):04X}"
    return Diagnostic("S002", f"unexpected {shown}", span, help="`#` starts a comment, and texts go in double quotes")


def _wanted(expected: set[str]) -> str:
    """What the parser could have gone on with, in a few words."""
    if {"NAME", "LEFT"} <= expected and "NUMBER" not in expected:
        return "a selector, such as attn.q, all linear or layers 0..3"
    if expected & {"EVEN", "ODD"}:
        return "a layer or a range of layers, such as 3, 0..3, -1, even or odd"
    if {"NUMBER", "TEXT"} <= expected and "NAME" in expected and "ON" not in expected:
        return "a value: a number, a percentage, a ratio, a quoted text or a word"
    if expected == {"TEXT"}:
        return "a quoted text"
    if expected == {"NUMBER"}:
        return "a number"
    if expected == {"NUMBER", "NAME"}:
        return "a number"
    if expected == {"NAME"}:
        return "a name"
    if expected == {"_EQUALS"}:
        return "`=`"
    if "LET" in expected:
        return "a verb"
    if expected <= {"ALL", "NAME", "LAYERS"}:
        return "linear or layers"
    words = [
        word for word, token in zip(KEYWORDS, ("ON", "IN", "EXCEPT", "AS", "EXPECT"), strict=True) if token in expected
    ]
    closing = ["`)`"] if "RIGHT" in expected and "ON" not in expected else []
    ends = ["the end of the statement"] if expected & {"_NEWLINE", "_SEMICOLON", "$END"} else []
    return listed([*closing, *(f"`{word}`" for word in words), *ends]) or "something else"


def _shown(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."
