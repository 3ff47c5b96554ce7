"""What the makers of PEFT adapters share: places with their tensors, names of modules, refusals."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from surgery.anatomy.parts import Part
from surgery.compiler.plan import Step
from surgery.errors import CheckpointError
from surgery.graph import soft, stack
from surgery.graph.module import Rewritten
from surgery.graph.settle import Settling
from surgery.graph.site import tensor_name

ROOT = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """One PEFT adapter: what its configuration says, its tensors by PEFT's names, and the modules that PEFT wraps."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    wrapped: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Place:
    """One part that a statement acts on, with the tensors it added there."""

    step: Step
    part: Part
    module: Rewritten

    def tensor(self, name: str) -> Tensor:
        """A tensor that the statement added, by the name it was added under; what is trained as a network, computed."""
        full = tensor_name(name, self.part, self.step.statement.name)
        if isinstance(self.module, Settling):
            return self.module.settled(full)
        return self.module.get_parameter(full).detach()

    @property
    def rows(self) -> Tensor:
        """The part's output channels."""
        runs = self.part.channels or ((0, self.part.width),)
        return torch.cat([torch.arange(start, stop) for start, stop in runs])

    @property
    def operation(self) -> Any:
        """The method as it is at this part."""
        return self.step.operation.at(self.part)


def place(model: nn.Module, step: Step, part: Part) -> Place:
    """Where a statement's tensors for a part are."""
    module = model.get_submodule(part.path)
    child = {"experts": stack.CHILD, "entry": soft.CHILD}.get(part.kind)
    for held in (module, *module.children()) if child is None else (module._modules.get(child),):
        if isinstance(held, Rewritten) and (held.facts is None) == (part.kind not in ("projection", "lookup", "bias")):
            return Place(step, part, held)
    raise cannot(f"`{step.statement}` has nothing of its own at {part.path}", "it may have been merged")


def targets(model: nn.Module, paths: Mapping[str, object]) -> list[str] | str:
    """Full paths; as one pattern where PEFT would take other modules that end in one of them as well."""
    ends = tuple(f".{path}" for path in paths)
    if any(name.endswith(ends) for name, _ in model.named_modules() if name not in paths):
        return "|".join(map(re.escape, paths))
    return sorted(paths)


def cannot(what: str, help: str = "") -> CheckpointError:
    """PEFT's format has no words for this."""
    return CheckpointError.of("S451", what, help=help)
