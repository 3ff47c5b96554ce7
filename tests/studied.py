"""Programs applied to the zoo's models, each kind of which is studied once: a study takes longer than most tests."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

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


def same_gradients(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Equal to the bit; but what layers share (a trunk) sums over them, in any order, so some units of its largest."""
    if one.keys() != other.keys():
        return False
    exact = [name for name in one if "_trunk_" not in name and "_embedding" not in name]
    near = [
        bool((one[name] - other[name]).abs().max() <= 16 * torch.finfo(one[name].dtype).eps * one[name].abs().max())
        for name in one.keys() - set(exact)
    ]
    return all(near) and all(torch.equal(one[name], other[name]) for name in exact)
