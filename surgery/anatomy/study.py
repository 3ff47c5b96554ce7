"""From a model to its anatomy: export the shadow, find the roles, and say them for every layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from surgery.anatomy.build import build
from surgery.anatomy.flow import Flow
from surgery.anatomy.inputs import check_model, example
from surgery.anatomy.parts import Anatomy
from surgery.anatomy.roles import Roles
from surgery.anatomy.stacks import Lists
from surgery.anatomy.trace import trace


def study(model: nn.Module, example_inputs: Any = None) -> Anatomy:
    """Stacks, layers and roles of a model, which may hold weights or be on the meta device. It is not touched.

    example_inputs: a tuple of positional arguments, a mapping of keyword arguments, or a tensor; needed for models that
    are not transformers text models. Dimensions should be at least 2 and all different.
    Raises ModelError S200 (not a module), S201 (no example inputs) and S202 (cannot be exported).
    """
    with studied(model, example_inputs) as roles:
        return build(model, roles)


@contextmanager
def studied(model: nn.Module, example_inputs: Any = None) -> Iterator[Roles]:
    """The roles of a model's graph, and inside whatever computing with it needs."""
    check_model(model)
    if example_inputs is None:
        example_inputs = example(model, torch.device("cpu"))
    arguments: tuple[Any, ...] = ()
    keywords: dict[str, Any] = {}
    if isinstance(example_inputs, Mapping):
        keywords = dict(example_inputs)
    elif isinstance(example_inputs, torch.Tensor):
        arguments = (example_inputs,)
    else:
        arguments = tuple(example_inputs)
    traced = trace(model, arguments, keywords)
    lists = Lists(model)
    # Whatever the caller has switched: numbers are computed here, with gradients, on the CPU.
    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
        yield Roles(Flow(traced, lists))
