"""Which part of a model is what: roles found by dataflow in an exported graph, and their selection."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from surgery.anatomy.parts import Anatomy, Heads, Kind, Part, Stack
from surgery.anatomy.select import select

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Anatomy", "Heads", "Kind", "Part", "Stack", "select", "study"]


def study(model: nn.Module, example_inputs: Any = None) -> Anatomy:
    """Stacks, layers and roles of a model; see `surgery.anatomy.study`, which is imported only when called."""
    from surgery.anatomy.study import study as study_model

    return study_model(model, example_inputs)


class _Package(ModuleType):
    """Keeps `study` the function: importing the module of that name would put the module in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name == "study" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
