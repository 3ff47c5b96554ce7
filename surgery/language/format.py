"""The formatter: one way to write a program. Works on the syntax tree, so verbs need not exist; comments stay."""

from __future__ import annotations

from surgery.errors import ProgramError
from surgery.language.faults import too_many
from surgery.language.roles import is_sibling
from surgery.language.source import Source
from surgery.language.syntax import MOST_FAULTS, read_tree
from surgery.language.tree import (
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

ORDER = ("on", "in", "except", "as", "expect")
WIDEST = 72


def format_text(text: str, name: str = "<text>") -> str:
    """The text in canonical form. Raises ProgramError with every statement that cannot be read."""
    tree, faults = read_tree(Source(name, text))
    if faults:
        raise ProgramError(*faults, *([too_many(MOST_FAULTS)] if len(faults) >= MOST_FAULTS else []))
    return tree_text(tree)


def tree_text(tree: Tree) -> str:
    """Single blank lines at most, and comments that follow statements on neighbouring lines aligned."""
    lines = [(" ; ".join(node_text(node) for node in line.nodes), line.comment) for line in _without_gaps(tree.lines)]
    return "".join(f"{line}\n" for line in _aligned(lines))


def node_text(node: Node) -> str:
    """One statement, single spaces between its words."""
    if isinstance(node, Directive):
        return f"{node.keyword} {node.number.text}"
    if isinstance(node, Let):
        return f"let {node.name.text} = {node.value.text}"
    if isinstance(node, Include):
        return f"include {node.path.text}"
    clauses = sorted(node.clauses, key=lambda clause: ORDER.index(clause.keyword))
    return " ".join(
        [
            node.verb.text,
            *(term_text(item) for item in node.items),
            *(f"{clause.keyword} {term_text(clause.value)}" for clause in clauses),
        ]
    )


def term_text(term: Selection) -> str:
    """A value or a selector."""
    if isinstance(term, (Word, Literal)):
        return term.text
    if isinstance(term, Every):
        return f"all {term.word.text}"
    if isinstance(term, LayerRange):
        stack = f"{term.stack.text} " if term.stack else ""
        return term.range if term.bare else f"{stack}layers {term.range}"
    if isinstance(term, Group):
        cuts = "".join(f" {keyword} {term_text(cut)}" for keyword, cut in term.cuts)
        return f"({term_text(term.first)}{cuts})"
    return _joined_text(term)


def _joined_text(joined: Joined) -> str:
    text = term_text(joined.first)
    role = joined.first.text if isinstance(joined.first, Word) else ""
    for separator, term in joined.rest:
        # Siblings stand close, `attn.q,v`; roles of their own apart, `attn, ffn`.
        close = separator == "," and isinstance(term, Word) and is_sibling(role, term.text)
        text += ("," if close else ", " if separator == "," else " + ") + term_text(term)
        name = term.text if isinstance(term, Word) else ""
        role = f"{role.rpartition('.')[0]}.{name}" if close else name
    return text


def _without_gaps(lines: tuple[Line, ...]) -> list[Line]:
    """No blank line at either end, and never two in a row."""
    kept: list[Line] = []
    for line in lines:
        if line.nodes or line.comment is not None:
            kept.append(line)
        elif kept and kept[-1] != Line():
            kept.append(Line())
    return kept[:-1] if kept and kept[-1] == Line() else kept


def _aligned(lines: list[tuple[str, str | None]]) -> list[str]:
    written: list[str] = []
    for start, stop in _blocks(lines):
        widths = [len(text) for text, comment in lines[start:stop] if comment is not None and len(text) <= WIDEST]
        column = max(widths, default=0)
        for text, comment in lines[start:stop]:
            written.append(text if comment is None else f"{text:<{column}}  {comment}" if text else comment)
    return written


def _blocks(lines: list[tuple[str, str | None]]) -> list[tuple[int, int]]:
    """Runs of lines with a statement; every other line on its own."""
    blocks: list[tuple[int, int]] = []
    start = 0
    for number, (text, _) in enumerate(lines):
        if not text:
            blocks += [(start, number), (number, number + 1)]
            start = number + 1
    return [*blocks, (start, len(lines))]
