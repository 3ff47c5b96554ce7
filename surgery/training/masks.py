"""A weight under a mask that changes while the model is trained, wherever it stands in the model now."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.anatomy.parts import Part
from surgery.compiler.plan import Step
from surgery.compiler.record import record_of
from surgery.graph.functions import pack_bits, unpack_bits
from surgery.graph.module import rewritten
from surgery.graph.site import seed_of, tensor_name
from surgery.operations.subnetwork import DENSE, MASK, STEP

HOLDS = "_surgery_holds_zeros"


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
        return self.model.get_submodule(self.part.path).get_parameter(self.part.parameter)

    @property
    def split(self) -> bool:
        """Whether the weight is split over processes, each of which holds a part."""
        return getattr(self.weight, "device_mesh", None) is not None

    @property
    def trained(self) -> bool:
        """Whether there is a weight that wants gradients, with its mask beside it: no codes, and nothing merged."""
        weight = self.model.get_submodule(self.part.path)._parameters.get(self.part.parameter)
        return weight is not None and weight.requires_grad and self._has(MASK)

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


def hold_zeros(model: nn.Module, optimizer: Any) -> None:
    """Set masked weights back to zero after every step of an optimizer whose arithmetic may move them.

    torch's own leave a zero alone that has no gradient and no moments. bitsandbytes' 8-bit states know no exact zero on
    a CPU, where zero is encoded as 2e-5 of the largest: that is a step of a whole learning rate in Lion.
    """
    if type(optimizer).__module__.startswith("torch.optim") or getattr(optimizer, HOLDS, False):
        return
    watched = weakref.ref(model)

    def after_step(*_: Any) -> None:
        alive = watched()
        for each in () if alive is None else _all_masked(alive):
            if each.trained and not each.split:
                with torch.no_grad():
                    each.weight.masked_fill_(~each.lie(each.mask()), 0)

    optimizer.register_step_post_hook(after_step)
    setattr(optimizer, HOLDS, True)


def _all_masked(model: nn.Module) -> list[MaskedWeight]:
    """Every weight under a mask, of whatever statement."""
    record = record_of(model)
    steps = [] if record is None else record.plan.steps
    return [
        each for step in steps if "exact_sparsity" in step.operation.promises() for each in weights_of(step, model, 0)
    ]


def close(model: nn.Module) -> None:
    """Let no weight ask for more than the gradient of what is kept: nobody is there who would read it."""
    for _, module in rewritten(model):
        for name, tensor in module._buffers.items():
            if name.endswith(DENSE) and name in module.added and tensor is not None:
                tensor.zero_()
