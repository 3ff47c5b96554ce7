"""A reshaped model has the layers and widths that were planned."""

from __future__ import annotations

import math
from collections.abc import Iterator

from surgery.anatomy.parts import Part
from surgery.anatomy.stacks import Lists
from surgery.graph.module import Rewritten
from surgery.verify.report import Finding
from surgery.verify.subject import Subject


def as_planned(subject: Subject) -> Iterator[Finding]:
    """Every stack has its depth, and every matrix its shape."""
    if not subject.plan.reshaping:
        return
    statements = "; ".join(str(step.statement) for step in subject.plan.reshaping)
    lists, anatomy = Lists(subject.model), subject.plan.anatomy
    wrong = [stack.path for stack in anatomy.stacks if stack.path not in lists.members]
    wrong += [
        stack.path for stack in anatomy.stacks if stack.path not in wrong and lists.depth(stack.path) != stack.depth
    ]
    wrong += [part.path for part in anatomy.parts if _other_shape(subject, part)]
    yield Finding("complete", wrong[0] if wrong else "model", len(wrong), 0.0, statements, "layers and widths")


def _other_shape(subject: Subject, part: Part) -> bool:
    if part.kind not in ("projection", "lookup"):
        return False
    try:
        module = subject.model.get_submodule(part.path)
    except AttributeError:
        return True
    if isinstance(module, Rewritten):
        return module.facts is not None and module.facts.shape != part.shape
    tensor = module._parameters.get(part.parameter)
    if tensor is None:
        return True
    if tensor.dim() > len(part.shape):  # by heads, or a convolution over one position
        return tensor.numel() != math.prod(part.shape)
    shape = tuple(tensor.shape)
    return (shape[::-1] if part.transposed else shape) != part.shape
