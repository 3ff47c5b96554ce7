"""Which part of a model is what: roles found by dataflow in an exported graph, and their selection."""

from __future__ import annotations

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
