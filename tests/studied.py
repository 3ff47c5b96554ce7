"""Programs applied to the zoo's models, each kind of which is studied once: a study takes longer than most tests."""

from __future__ import annotations

from functools import cache
from typing import Any

import surgery
from surgery.anatomy.parts import Anatomy
from tests import zoo


@cache
def anatomy(name: str) -> Anatomy:
    specimen = zoo.specimen(name)
    return surgery.study(specimen.model, specimen.example)


def apply(program: str, name: str, model: Any, tokenizer: Any = None) -> Any:
    """The model, a specimen of that name, transformed."""
    plan = surgery.plan(surgery.parse(program), model, tokenizer=tokenizer, anatomy=anatomy(name))
    return surgery.apply(plan, model, tokenizer=tokenizer)
