"""Quoted texts: what their escapes mean, and how a text is quoted again."""

from __future__ import annotations

import re

from surgery.errors import ProgramError
from surgery.language.source import Span
from surgery.language.tree import Literal

ESCAPES = {"\\": "\\", '"': '"', "n": "\n", "t": "\t", "r": "\r"}
ESCAPE = re.compile(r"\\(.)", re.DOTALL)


def decode(literal: Literal) -> str:
    """The text between the quotes. Raises ProgramError (S006) at an escape that does not exist."""
    for match in ESCAPE.finditer(literal.text):
        if match[1] not in ESCAPES:
            start = literal.span.start + match.start()
            raise ProgramError.of(
                "S006",
                f"'{match[0]}' is no escape",
                Span(literal.span.source, start, start + len(match[0])),
                help='a backslash goes before \\, ", n, t or r; write \\\\ for a backslash itself',
            )
    return ESCAPE.sub(lambda match: ESCAPES[match[1]], literal.text[1:-1])


def encode(text: str) -> str:
    """The text in quotes, so that `decode` gives it back."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + escaped.replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r") + '"'
