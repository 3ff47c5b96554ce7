"""Text to syntax tree, by the grammar in surgery.lark; an error costs its statement only: all are reported."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from surgery.errors import Diagnostic
from surgery.language.data import grammar_file
from surgery.language.faults import syntax_fault, too_deep, too_large
from surgery.language.source import Source, Span
from surgery.language.tree import (
    Act,
    Clause,
    Directive,
    Every,
    Group,
    Include,
    Joined,
    LayerRange,
    Let,
    Line,
    Literal,
    Node,
    Selection,
    Tree,
    Word,
)

if TYPE_CHECKING:
    import lark

LARGEST = 1_000_000
DEEPEST = 64
MOST_FAULTS = 100
PIECES = re.compile(r'"(?:[^"\\\n]|\\.)*"?|#.*|[;()\n]|[^";#()\n]+')
FORMS: dict[str, Any] = {
    "NUMBER": "number",
    "PERCENT": "percent",
    "RATIO": "ratio",
    "TEXT": "text",
    "COMPARE": "compare",
}


def read_tree(source: Source) -> tuple[Tree, tuple[Diagnostic, ...]]:
    """The tree of every statement that can be read, and a diagnostic for each that cannot."""
    from lark import UnexpectedInput

    if len(source.text) > LARGEST:
        return Tree(()), (too_large(Span(source, 0, 1)),)
    deep = _too_deep(source)
    if deep is not None:
        return Tree(()), (deep,)
    try:
        return _Reader(source, 0).tree(_parser().parse(source.text, start="program")), ()
    except UnexpectedInput:
        return _read_by_statement(source)


@cache
def _parser() -> lark.Lark:
    from lark import Lark

    return Lark(grammar_file("surgery.lark"), parser="lalr", lexer="contextual", start=["program", "line"])


def _too_deep(source: Source) -> Diagnostic | None:
    depth = 0
    for piece in PIECES.finditer(source.text):
        depth = 0 if piece[0] in ";\n" else max(0, depth + {"(": 1, ")": -1}.get(piece[0], 0))
        if depth > DEEPEST:
            return too_deep(Span(source, piece.start(), piece.end()))
    return None


def _read_by_statement(source: Source) -> tuple[Tree, tuple[Diagnostic, ...]]:
    from lark import UnexpectedInput

    lines: list[Line] = []
    diagnostics: list[Diagnostic] = []
    for pieces in _statements(source.text):
        if len(diagnostics) >= MOST_FAULTS:
            break
        read: list[Line] = []
        for start, text in pieces:
            try:
                read.append(_Reader(source, start).line(_parser().parse(text, start="line")))
            except UnexpectedInput as error:
                diagnostics.append(syntax_fault(error, source, start, text))
        comments = [line.comment for line in read if line.comment is not None]
        lines.append(Line(tuple(node for line in read for node in line.nodes), comments[-1] if comments else None))
    return Tree(tuple(lines)), tuple(diagnostics)


def _statements(text: str) -> Iterator[list[tuple[int, str]]]:
    """For each line its statements, as offset and text; a comment stays with the last of them."""
    offset = 0
    for line in text.split("\n"):
        bounds = [piece.start() for piece in PIECES.finditer(line) if piece[0] == ";"]
        starts = [0, *(bound + 1 for bound in bounds)]
        stops = [*bounds, len(line.removesuffix("\r"))]
        yield [(offset + start, line[start:stop]) for start, stop in zip(starts, stops, strict=True)]
        offset += len(line) + 1


class _Reader:
    """Turns lark's tree into ours; `offset` is where the parsed text starts in the source."""

    def __init__(self, source: Source, offset: int) -> None:
        self.source = source
        self.offset = offset

    def tree(self, program: Any) -> Tree:
        return Tree(tuple(self.line(line) for line in program.children))

    def line(self, line: Any) -> Line:
        children = list(line.children)
        comment = str(children.pop()).rstrip() if children and _type(children[-1]) == "COMMENT" else None
        return Line(tuple(self.node(child) for child in children), comment)

    def node(self, node: Any) -> Node:
        span = self.span(*_ends(node))
        parts = node.children
        if node.data in ("version", "seed"):
            return Directive(str(parts[0]), self.literal(parts[1]), span)
        if node.data == "let":
            value = parts[2]
            if _type(value) == "table":
                return Let(self.word(parts[1]), self.table(value), span)
            return Let(self.word(parts[1]), self.word(value) if _type(value) == "NAME" else self.literal(value), span)
        if node.data == "include":
            return Include(self.literal(parts[1]), span)
        said = [part for part in parts[1:] if _type(part) not in CLAUSES]
        clauses = [part for part in parts[1:] if _type(part) in CLAUSES]
        return Act(
            self.word(parts[0]),
            tuple(self.selection(part) for part in said),
            tuple(
                Clause(str(clause.children[0]), self.selection(clause.children[1]), self.span(*_ends(clause)))
                for clause in clauses
            ),
            span,
        )

    def selection(self, node: Any, bare: bool = False) -> Selection:
        """Items, terms, and terms joined; `bare`: after a comma, where ranges go without their `layers`."""
        kind = _type(node)
        span = self.span(*_ends(node))
        if kind in ("items", "selection"):
            first, *rest = node.children
            if not rest:
                return self.selection(first)
            pairs = zip(rest[::2], rest[1::2], strict=True)
            return Joined(
                self.selection(first), tuple((str(by), self.selection(term, True)) for by, term in pairs), span
            )
        if kind == "table":
            return self.table(node)
        if kind == "every":
            return Every(self.word(node.children[1]), span)
        if kind == "layers":
            return LayerRange(str(node.children[1]), span=span)
        if kind == "stacked":
            return LayerRange(str(node.children[2]), self.word(node.children[0]), span=span)
        if kind == "group":
            first, *rest = node.children[1:-1]
            pairs = zip(rest[::2], rest[1::2], strict=True)
            return Group(self.selection(first), tuple((str(by), self.selection(cut)) for by, cut in pairs), span)
        if kind in ("NAME", "IN"):
            return self.word(node)
        if bare and kind in ("NUMBER", "RANGE"):
            return LayerRange(str(node), bare=True, span=span)
        return self.literal(node)

    def word(self, token: Any) -> Word:
        return Word(str(token), self.span(token, token))

    def literal(self, token: Any) -> Literal:
        return Literal(FORMS[token.type], str(token), self.span(token, token))

    def table(self, node: Any) -> Literal:
        return Literal("table", ", ".join(map(str, node.children[::2])), self.span(*_ends(node)))

    def span(self, first: Any, last: Any) -> Span:
        return Span(self.source, self.offset + first.start_pos, self.offset + last.end_pos)


CLAUSES = frozenset(("on", "scope", "cut", "alias", "expect"))


def _type(node: Any) -> str:
    return str(node.type if hasattr(node, "type") else node.data)


def _ends(node: Any) -> tuple[Any, Any]:
    """First and last token of a node; every node of this grammar begins and ends with what its children do."""
    first = last = node
    while not hasattr(first, "type"):
        first = first.children[0]
    while not hasattr(last, "type"):
        last = last.children[-1]
    return first, last
