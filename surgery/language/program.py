"""A program: statements whose operations are typed and complete, ready for planning. Knows no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from surgery.language.selector import Selector
from surgery.language.source import NOWHERE, Source, Span

if TYPE_CHECKING:
    from surgery.operations.base import Operation


@dataclass(frozen=True)
class Statement:
    """One operation and what it acts on; `in` and `except` are folded into the selector.

    places: the span of each option that was written, by field name.
    """

    operation: Operation
    selector: Selector
    name: str | None = None
    expect: int | None = None
    span: Span = field(default=NOWHERE, compare=False, repr=False)
    places: Mapping[str, Span] = field(default_factory=dict, compare=False, repr=False)

    def __str__(self) -> str:
        """Canonical text: defaults left out, parameters resolved."""
        from surgery.language.write import statement_text

        return statement_text(self)


@dataclass(frozen=True, eq=False)
class Program:
    """A set of statements, kept in the order they were written; two programs are equal whatever that order."""

    statements: tuple[Statement, ...]
    source: Source = field(default=NOWHERE.source, repr=False)
    seed: int = 0

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Program):
            return NotImplemented
        return self.seed == other.seed and Counter(self.statements) == Counter(other.statements)

    def __hash__(self) -> int:
        return hash((self.seed, frozenset(self.statements)))

    def __str__(self) -> str:
        """Canonical text, which parses back to an equal program."""
        seed = [f"seed {self.seed}"] if self.seed else []
        return "".join(f"{line}\n" for line in [*seed, *map(str, self.statements)])
