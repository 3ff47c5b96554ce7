"""Program texts and places in them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Source:
    """A program's text and the name it is reported under (`qlora.surgery`, `<text>`, `--set`)."""

    name: str
    text: str = field(repr=False)

    def line_column(self, offset: int) -> tuple[int, int]:
        """One-based line and column of an offset."""
        before = self.text[:offset]
        return before.count("\n") + 1, offset - (before.rfind("\n") + 1) + 1

    def line(self, number: int) -> str:
        """The text of a one-based line, without its end."""
        lines = self.text.split("\n")
        return lines[number - 1].rstrip("\r") if 0 < number <= len(lines) else ""


@dataclass(frozen=True)
class Span:
    """Characters `start` to `stop` (exclusive) of a source."""

    source: Source
    start: int
    stop: int

    @property
    def text(self) -> str:
        return self.source.text[self.start : self.stop]

    def __str__(self) -> str:
        line, column = self.source.line_column(self.start)
        return f"{self.source.name}:{line}:{column}"


NOWHERE = Span(Source("<nowhere>", ""), 0, 0)
