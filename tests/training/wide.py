"""A small decoder whose matrices are wide enough for 8-bit states: under a program, and trained as its masks move."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import surgery
from surgery.anatomy.parts import Anatomy
from surgery.training.masks import MaskedWeight, weights_of
from tests import zoo
from tests.reference_decoder import ReferenceDecoder, Shape, reference_decoder

WIDE = Shape(vocabulary=41, width=64, layers=1, heads=4, key_value_heads=2, ffn=80)  # 4,096 and more: 8-bit state
FED = (zoo.tokens(41),)
RIGL = "sparse rigl 80% swap 30% every 2 steps until 9 steps on ffn"
GRADUAL = "prune magnitude 10% to 80% over 8 steps every 2 steps on ffn"


def applied(text: str, shape: Shape = WIDE, dtype: torch.dtype = torch.float32) -> ReferenceDecoder:
    model = reference_decoder(shape, dtype=dtype)
    return surgery.apply(surgery.plan(surgery.parse(text), model, anatomy=anatomy(shape)), model)


@cache
def anatomy(shape: Shape) -> Anatomy:
    return surgery.study(reference_decoder(shape), FED)


def places(model: nn.Module) -> list[MaskedWeight]:
    record: Any = model.__dict__["_surgery"]
    return [
        each
        for step in record.plan.steps
        if "mask" in step.operation.claims(None)
        for each in weights_of(step, model, 0)
    ]


def loss(model: nn.Module) -> Tensor:
    return model(*FED).square().mean()  # type: ignore[no-any-return]


def train(model: nn.Module, optimizer: Any, steps: int, late: bool = False, **known: Any) -> list[bool]:
    """Whether masks moved at each step. late: the schedule's step comes after the optimizer's."""
    schedule = surgery.schedule(model, optimizer, **known)
    moved = []
    for _ in range(steps):
        loss(model).backward()
        for each in (schedule, optimizer) if not late else (optimizer, schedule):
            told = each.step()
            moved += [told] if each is schedule else []
        for each in places(model):
            assert bool((each.lie(each.weight.detach())[~each.mask()] == 0).all()), "a zero has moved"
        optimizer.zero_grad()
    return moved
