"""Every verb alone and in every pair keeps what it promises, on drawn models; illegal pairs name both statements."""

from __future__ import annotations

from itertools import combinations_with_replacement

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.operations import TABLE
from tests import strategies
from tests.properties.laws import Case
from tests.properties.pairs import STATEMENTS, everything_promised_holds, programs

PAIRS = list(combinations_with_replacement(sorted(STATEMENTS), 2))


def test_every_verb_is_drawn() -> None:
    """A new verb needs a line in tests/properties/pairs.py."""
    assert STATEMENTS.keys() == TABLE.keys()


def check(verbs: tuple[str, ...], examples: int) -> None:
    @settings(max_examples=examples)
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        model = data.draw(strategies.models(("float64",)))
        everything_promised_holds(Case(model, data.draw(programs(model, verbs))))

    holds()


@pytest.mark.parametrize("verb", sorted(STATEMENTS))
def test_every_verb_alone(verb: str) -> None:
    check((verb,), 2)


def test_some_pairs() -> None:
    @settings(max_examples=max(4, settings().max_examples // 5))
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        verbs = data.draw(st.sampled_from(PAIRS))
        model = data.draw(strategies.models(("float64", "float32")))
        everything_promised_holds(Case(model, data.draw(programs(model, verbs))))

    holds()


@pytest.mark.slow
@pytest.mark.parametrize("verbs", PAIRS, ids=" ".join)
def test_all_pairs(verbs: tuple[str, str]) -> None:
    check(verbs, 4)
