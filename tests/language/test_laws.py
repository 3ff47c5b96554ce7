"""Laws of the language: what is printed is read back, formatting is idempotent, order means nothing."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.lark import from_lark

from surgery.errors import Diagnostic, ProgramError
from surgery.language import format_text, parse
from surgery.language.data import grammar_file
from surgery.language.format import tree_text
from surgery.language.program import Program
from surgery.language.source import Source
from surgery.language.syntax import _parser, _read_by_statement, read_tree
from surgery.language.tree import Line, Tree
from surgery.language.write import selector_text
from tests.language import drawn

OURS = ("lora", "quantize", "prune", "prefix")


def read(text: str) -> Tree:
    tree, faults = read_tree(Source("drawn", text))
    assert not faults, "\n".join(map(str, faults))
    return tree


def filled(tree: Tree) -> tuple[Line, ...]:
    return tuple(line for line in tree.lines if line != Line())


def spaced(text: str, draw: Any) -> str:
    """The same program with other white space: wide gaps between tokens, blank lines, `\\r\\n`."""
    pieces = re.findall(r'"(?:[^"\\]|\\.)*"|#[^\n]*|[^\s"#]+|\s', text)
    return "".join(draw.draw(st.sampled_from((" ", "\t", "   "))) if piece == " " else piece for piece in pieces)


@given(drawn.trees)
def test_printed_trees_are_read_back(tree: Tree) -> None:
    """parse(print(ast)) == ast, up to blank lines; every comment is kept, in order."""
    text = tree_text(tree)
    assert filled(read(text)) == filled(tree)
    assert [line.comment for line in read(text).lines if line.comment] == [
        line.comment for line in tree.lines if line.comment
    ]


@given(drawn.trees, st.data())
def test_formatting_is_idempotent_and_undoes_spacing(tree: Tree, data: Any) -> None:
    """fmt twice is fmt once, and other white space in the text changes nothing in what comes out."""
    text = tree_text(tree)
    assert format_text(text) == text
    assert format_text(spaced(text, data)) == text
    assert format_text(text.replace("\n", "\r\n")) == text


@given(drawn.trees)
def test_reading_by_statement_agrees_with_the_grammar(tree: Tree) -> None:
    """The reader that recovers from errors sees in a faultless text what the grammar says about the whole."""
    text = tree_text(tree)
    assert _read_by_statement(Source("drawn", text)) == (read(text), ())


@given(drawn.selectors)
def test_printed_selectors_are_read_back(selector: Any) -> None:
    """Any tree of unions, scopes and cuts can be written, and means itself."""
    (statement,) = parse(f"lora rank 1 on {selector_text(selector)}").statements
    assert statement.selector == selector


@given(drawn.programs(*OURS))
def test_printed_programs_are_read_back(program: Program) -> None:
    """parse(str(p)) == p, with every option of our verbs at any value, bit for bit."""
    assert parse(str(program)) == program


@pytest.mark.usefixtures("toys")
@given(st.data())
def test_printed_programs_of_other_packages_are_read_back(data: Any) -> None:
    program = data.draw(drawn.programs("toy", "lora"))
    assert parse(str(program)) == program


@given(drawn.programs(*OURS))
def test_formatting_keeps_the_meaning(program: Program) -> None:
    """parse(fmt(p)) == parse(p), and canonical text is a fixed point of the formatter."""
    text = str(program)
    assert format_text(text) == text
    assert parse(format_text(text)) == program


@given(drawn.programs(*OURS), st.randoms(use_true_random=False))
def test_order_means_nothing(program: Program, random: Any) -> None:
    """Permuted statements are the same program, and a program less one statement is another."""
    lines = str(program).split("\n")
    shuffled = random.sample(lines, len(lines))
    assert parse("\n".join(shuffled)) == program
    assert hash(parse(" ; ".join(shuffled))) == hash(program)
    if program.statements:
        assert Program(program.statements[1:], seed=program.seed) != program


@given(from_lark(_parser(), start="program"))
def test_whatever_the_grammar_draws_is_accepted_or_refused_with_a_span(text: str) -> None:
    """Never a crash, and every complaint is about a place inside the text."""
    refused_with_spans(text)


@given(st.text(st.sampled_from('lora rank8on.at\n;#"%:,+()=<-0 \\\r\x00é') | st.characters(), max_size=40))
def test_any_text_is_accepted_or_refused_with_a_span(text: str) -> None:
    refused_with_spans(text)


def complaints(text: str) -> tuple[Diagnostic, ...]:
    try:
        parse(text)
    except ProgramError as error:
        return error.diagnostics or (Diagnostic("S000", "refused without a word"),)
    return ()


def refused_with_spans(text: str) -> bool:
    """Whether a text is refused, asserting that every complaint is about a place inside it."""
    found = complaints(text)
    for diagnostic in found:
        span = diagnostic.span
        assert span is not None
        assert 0 <= span.start <= span.stop <= len(text)
        assert str(diagnostic).startswith(f"error[{diagnostic.code}]")
    return bool(found)


def test_the_grammar_stays_on_about_a_page() -> None:
    assert len(grammar_file("surgery.lark").splitlines()) <= 100
