"""Defects that peers are known for, each by its number in the list below, and none of them here.

1 requantizing on a merge  2 bfloat16 merges that round twice  3 merging after a forward that repacked codes
4 merging into a tied head  5 merging one of several adapters  6 subclasses of Linear  7 experts skipped in silence
8 parts of fused projections  9 methods that exclude each other  10 prefixes and caches  11 prompts and padding
12 prompt encoders lost on save  13 weights rewritten inside `forward`  14 combinations with rs scaling
15 models that cannot be traced  16 tolerances that pass anything  17 tables of architectures

Their tests: test_defects_of_merges, test_defects_of_prompts, test_defects_of_capture. What these share is here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import surgery
from tests import zoo


def trained(model: Any, program: str, size: float = 0.3, example: Any = None) -> Any:
    """The model under the program, with random values in all that the program added."""
    surgery.apply(surgery.parse(program), model, example_inputs=example)
    with torch.no_grad():
        for name, parameter in surgery.parameters(model).items():
            drawn = torch.randn(parameter.shape, generator=zoo.seeded(1, name), dtype=torch.float64)
            parameter.copy_(size * parameter.shape[-1] ** -0.5 * drawn)
    return model


def weights(model: nn.Module, role: str) -> dict[str, Tensor]:
    """Weights by path of every part with that role."""
    return {
        part.path: model.get_submodule(part.path).weight for part in surgery.study(model).parts if part.role == role
    }
