"""A weight under a mask that changes while the model is trained, wherever it stands in the model now."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surgery.anatomy.parts import Part
from surgery.compiler.plan import Step
from surgery.errors import GraphError
from surgery.graph.functions import pack_bits, unpack_bits
from surgery.graph.module import rewritten
from surgery.graph.site import seed_of, tensor_name
from surgery.operations.subnetwork import DENSE, MASK, STEP


@dataclass(frozen=True)
class MaskedWeight:
    """One place of a statement. Its tensors are looked up when they are asked for: a second program may move them."""

    model: nn.Module
    part: Part
    verb: str
    name: str | None
    seed: int

    @property
    def weight(self) -> nn.Parameter:
        """As it is stored, (in, out) of a transposed one."""
        found = self.model.get_submodule(self.part.path).get_parameter(self.part.parameter)
        if getattr(found, "device_mesh", None) is not None:
            raise GraphError.of(
                "S374",
                f"{self.part.path} is split over processes, and its mask is chosen of all of it",
                help="train with data parallelism, which keeps it whole",
            )
        return found

    def mask(self) -> Tensor:
        """(out, in), True where a weight is kept."""
        shape = self.part.shape[::-1] if self.part.transposed else self.part.shape
        return self.lie(unpack_bits(self._buffer(MASK), shape))

    def lie(self, stored: Tensor) -> Tensor:
        """(out, in) of what lies as the weight is stored, and the other way round."""
        return stored.t() if self.part.transposed else stored

    def put(self, mask: Tensor, step: int) -> Tensor:
        """Change the mask, and set to zero what it does not keep and what it has not kept before.

        Gives (as stored) which weights are kept and were kept before.
        """
        same = self.lie(mask & self.mask())
        self._buffer(MASK).copy_(pack_bits(self.lie(mask).contiguous()))
        if self._has(STEP):
            self._buffer(STEP).fill_(step)
        with torch.no_grad():
            self.weight.masked_fill_(~same, 0)
        return same

    @property
    def step(self) -> int:
        """When the mask changed last, where that is kept beside it."""
        return int(self._buffer(STEP)) if self._has(STEP) else 0

    def ask(self, dense: bool) -> None:
        """Whether backward passes give the gradient of every weight from now on, or of those that are kept."""
        if self._has(DENSE):
            self._buffer(DENSE).fill_(255 if dense else 0)

    def generator(self, step: int) -> torch.Generator:
        """Random numbers of one step at this place, whatever was drawn before."""
        return torch.Generator().manual_seed(seed_of(self.seed, self.part.path, self.verb, step))

    def _buffer(self, name: str) -> Tensor:
        return self.model.get_submodule(self.part.path).get_buffer(tensor_name(name, self.part, self.name))

    def _has(self, name: str) -> bool:
        return tensor_name(name, self.part, self.name) in self.model.get_submodule(self.part.path)._buffers


def weights_of(step: Step, model: nn.Module, seed: int) -> list[MaskedWeight]:
    """The places of a statement in a model to which it was applied."""
    return [MaskedWeight(model, part, step.operation.verb, step.statement.name, seed) for part in step.parts]


def close(model: nn.Module) -> None:
    """Let no weight ask for more than the gradient of what is kept: nobody is there who would read it."""
    for _, module in rewritten(model):
        for name, tensor in module._buffers.items():
            if name.endswith(DENSE) and name in module.added and tensor is not None:
                tensor.zero_()
