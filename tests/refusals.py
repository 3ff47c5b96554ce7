"""What a plan refuses, and what it says: with a code, in words, at the statement."""

from __future__ import annotations

from typing import Any

import pytest

import surgery
from surgery.errors import SurgeryError


def assert_refused(
    program: str, model: Any, code: str, words: str, error: type[SurgeryError] = SurgeryError, **given: Any
) -> SurgeryError:
    """The error, what it tells first having that code and a place in the program, and all of it these words."""
    with pytest.raises(error) as caught:
        surgery.plan(surgery.parse(program), model, **given)
    told = caught.value.diagnostics[0]
    assert told.code == code
    assert words in str(caught.value)
    assert told.span is not None
    return caught.value
