"""The long story behind an error code, from grammar/errors.md."""

from __future__ import annotations

import re

from surgery.language.data import grammar_file

SECTION = re.compile(r"^## (S\d{3})\b.*$", re.MULTILINE)


def explanations() -> dict[str, str]:
    """Every code with its section, title line included, in order of the codes."""
    text = grammar_file("errors.md")
    starts = list(SECTION.finditer(text))
    stops = [start.start() for start in starts[1:]] + [len(text)]
    return dict(
        sorted((start[1], text[start.start() : stop].strip()) for start, stop in zip(starts, stops, strict=True))
    )


def explain(code: str) -> str | None:
    """The section of a code, None when there is none."""
    return explanations().get(code.upper())
