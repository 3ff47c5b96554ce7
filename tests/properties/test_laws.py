"""The suite drawn from the table of laws: each law on models, dimensions, dtypes and programs that Hypothesis draws."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.properties.case import Law
from tests.properties.laws import LAWS

# A case that builds, exports and transforms a model costs a hundred times what one of the language does.
_SHARE = {0: 1.0, 1: 0.12, 2: 0.06, 3: 0.04}


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_law(law: Law) -> None:
    examples = max(1, int(settings().max_examples * _SHARE[law.cost]))

    @settings(max_examples=examples)
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        law.check(data.draw(law.cases))

    holds()


def test_every_law_has_a_name_of_its_own() -> None:
    assert len({law.name for law in LAWS}) == len(LAWS)
