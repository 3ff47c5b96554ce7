"""The table of pairs says what the planner does, pair by pair, on a real model."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import combinations_with_replacement
from pathlib import Path

import pytest

import surgery
from surgery.anatomy.parts import Anatomy
from surgery.errors import PlanError
from surgery.language.pairs import NAME, pair, statements
from surgery.language.program import Program, Statement
from surgery.operations import TABLE
from surgery.operations.forms import FORMS
from tests import zoo
from tests.reference_decoder import Shape, reference_decoder

SHAPE = Shape(layers=2)


@cache
def anatomy() -> Anatomy:
    return surgery.study(reference_decoder(SHAPE), (zoo.tokens(SHAPE.vocabulary, 2, 5),))


@pytest.fixture(autouse=True)
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("examples.jsonl").write_text('{"input": "w5", "output": "w6"}\n')


def refused(*made: Statement) -> PlanError | None:
    try:
        surgery.plan(
            Program((*made, *surgery.parse("lora rank 1 on head as bystander").statements)),
            reference_decoder(SHAPE),
            example_inputs=(zoo.tokens(SHAPE.vocabulary, 2, 5),),
            tokenizer=zoo.tokenizer(SHAPE.vocabulary),
            anatomy=anatomy(),
        )
    except PlanError as error:
        return error
    return None


def test_every_verb_is_in_the_table() -> None:
    """A new verb needs its main forms in surgery/operations/forms.py."""
    assert FORMS.keys() == TABLE.keys()
    assert all(str(row).startswith(row.operation.verb) for row in statements(TABLE))


def pairs() -> list[tuple[Statement, Statement]]:
    return list(combinations_with_replacement(statements(TABLE), 2))


def read(statement: Statement) -> Statement:
    """As errors name it: with the tokens of its text counted."""
    return replace(statement, operation=statement.operation.read(zoo.tokenizer(SHAPE.vocabulary)))


def check(one: Statement, other: Statement) -> None:
    said, error = pair(one, other), refused(one, other)
    assert (error is None) == (said.verdict == "+"), f"`{one}` and `{other}`: {said} {error}"
    if error is not None:
        assert all(str(read(statement)) in str(error) for statement in (one, other)), "both are named"
    if said.verdict == "as" and one.operation.verb != "adapter":
        assert refused(one, replace(other, name=NAME)) is None
    if said.verdict == "-":
        assert refused(one, replace(other, name=NAME)) is not None


@pytest.mark.parametrize("form", statements(TABLE), ids=str)
def test_forms_stand_alone(form: Statement) -> None:
    assert refused(form) is None


@pytest.mark.parametrize("pair", pairs()[::7], ids=lambda pair: f"{pair[0]}, {pair[1]}")
def test_some_pairs_are_as_the_table_says(pair: tuple[Statement, Statement]) -> None:
    check(*pair)


@pytest.mark.slow
def test_all_pairs_are_as_the_table_says() -> None:
    for one, other in pairs():
        check(one, other)


def test_adapters_stack_by_name() -> None:
    first, second = surgery.parse(
        "adapter bottleneck 2 then b after ffn as a\nadapter bottleneck 2 after ffn as b"
    ).statements
    assert refused(first, second) is None
