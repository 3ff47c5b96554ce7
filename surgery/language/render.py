"""A diagnostic as text: where, the line with the place underlined, what is wrong, what would be right."""

from __future__ import annotations

import unicodedata

from surgery.errors import Diagnostic
from surgery.language.source import Span

WINDOW = 110
LONGEST = 2000
RED, BLUE, BOLD, PLAIN = "\x1b[1;31m", "\x1b[1;34m", "\x1b[1m", "\x1b[0m"


def render(diagnostic: Diagnostic, color: bool = False) -> str:
    """Several lines, without a newline at the end; with escape codes for a terminal when `color`."""
    red, blue, bold, plain = (RED, BLUE, BOLD, PLAIN) if color else ("", "", "", "")
    head = f"{red}error[{diagnostic.code}]{plain}{bold}: {_clip(diagnostic.message)}{plain}"
    span = diagnostic.span
    excerpt, margin = _excerpt(span, diagnostic.label, blue, red, plain) if span and span.source.text else ([], 0)
    where = [f"{' ' * margin} {blue}-->{plain} {span}"] if span and span.source.name != "<nowhere>" else []
    notes = [f"help: {_clip(diagnostic.help)}"] if diagnostic.help else []
    if not excerpt and diagnostic.label:
        notes.insert(0, diagnostic.label)
    notes.append(f"`surgery explain {diagnostic.code}` tells more")
    return "\n".join([head, *where, *excerpt, *(f"{' ' * margin} {blue}={plain} {note}" for note in notes)])


def _excerpt(span: Span, label: str, blue: str, red: str, plain: str) -> tuple[list[str], int]:
    line, column = span.source.line_column(span.start)
    text = span.source.line(line)
    start = min(column - 1, len(text))
    stop = max(start, min(start + span.stop - span.start, len(text)))
    first = max(0, start - WINDOW // 2) if len(text) > WINDOW else 0
    shown = text[first : first + WINDOW]
    before, marked = text[first:start], text[start : min(stop, first + WINDOW)]
    number = str(line)
    edge = " " * len(number)
    carets = "^" * max(1, _width(marked))
    return [
        f"{edge} {blue}|{plain}",
        f"{blue}{number} |{plain} {_flat(shown)}".rstrip(),
        f"{edge} {blue}|{plain} {' ' * _width(before)}{red}{carets}{plain}{' ' if label else ''}{label}",
    ], len(number)


def _clip(text: str) -> str:
    """A message quotes the program, and a program may have words of any length."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ... ({len(text) - LONGEST} more characters)"


def _flat(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)


def _width(text: str) -> int:
    """Columns of a terminal: two for wide characters, none for combining ones."""
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in _flat(text)
    )
