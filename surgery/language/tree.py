"""The syntax tree: what was written, before any verb's vocabulary is consulted. Spans do not compare."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal as OneOf

from surgery.language.source import NOWHERE, Span


@dataclass(frozen=True)
class Word:
    """A name, perhaps with dots: a verb, an option, a choice, a role."""

    text: str
    span: Span = field(default=NOWHERE, compare=False, repr=False)


@dataclass(frozen=True)
class Literal:
    """A value as it was written: `8`, `5%`, `2:4`, `"text"` with its quotes, `<=`; `4, 8, 16` with single spaces."""

    form: OneOf["number", "percent", "ratio", "text", "compare", "table"]
    text: str
    span: Span = field(default=NOWHERE, compare=False, repr=False)


@dataclass(frozen=True)
class Every:
    """`all linear`, `all layers`."""

    word: Word
    span: Span = field(default=NOWHERE, compare=False, repr=False)


@dataclass(frozen=True)
class LayerRange:
    """`layers 0..3`, `layers even`, `decoder layers -1`; after a comma also the bare range."""

    range: str
    stack: Word | None = None
    bare: bool = False
    span: Span = field(default=NOWHERE, compare=False, repr=False)


@dataclass(frozen=True)
class Group:
    """`( ... in ... except ... )`; cuts are applied from left to right."""

    first: Selection
    cuts: tuple[tuple[str, Selection], ...] = ()
    span: Span = field(default=NOWHERE, compare=False, repr=False)


@dataclass(frozen=True)
class Joined:
    """Two or more terms, each after the first with the `+` or `,` before it."""

    first: Selection
    rest: tuple[tuple[str, Selection], ...]
    span: Span = field(default=NOWHERE, compare=False, repr=False)


Selection = Word | Literal | Every | LayerRange | Group | Joined


@dataclass(frozen=True)
class Clause:
    """`on`, `in`, `except`, `as` or `expect`, and what follows it."""

    keyword: str
    value: Selection
    span: Span = field(default=NOWHERE, compare=False, repr=False)


@dataclass(frozen=True)
class Act:
    """A verb with what is said to it."""

    verb: Word
    items: tuple[Selection, ...] = ()
    clauses: tuple[Clause, ...] = ()
    span: Span = field(default=NOWHERE, compare=False, repr=False)


@dataclass(frozen=True)
class Let:
    """`let r = 8`."""

    name: Word
    value: Word | Literal
    span: Span = field(default=NOWHERE, compare=False, repr=False)


@dataclass(frozen=True)
class Include:
    """`include "base.surgery"`."""

    path: Literal
    span: Span = field(default=NOWHERE, compare=False, repr=False)


@dataclass(frozen=True)
class Directive:
    """`surgery 1`, the version of the language, or `seed 7`."""

    keyword: str
    number: Literal
    span: Span = field(default=NOWHERE, compare=False, repr=False)


Node = Act | Let | Include | Directive


@dataclass(frozen=True)
class Line:
    """What stands on one line of the text: statements, then perhaps a comment with its `#`."""

    nodes: tuple[Node, ...] = ()
    comment: str | None = None


@dataclass(frozen=True)
class Tree:
    """A whole text, line by line."""

    lines: tuple[Line, ...]

    @property
    def nodes(self) -> tuple[Node, ...]:
        return tuple(node for line in self.lines for node in line.nodes)
