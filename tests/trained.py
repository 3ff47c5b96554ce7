"""Models as after some training: every parameter that a program added is a little away from where it started."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import surgery
from tests import zoo


def trained(model: nn.Module) -> Any:
    for name, parameter in surgery.parameters(model).items():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=zoo.seeded(5, name), dtype=parameter.dtype))
    return model


def trained_under(program: str, model: nn.Module, example: Any = None) -> Any:
    return trained(surgery.apply(surgery.parse(program), model, example_inputs=example))
