"""Masks that move while a model is trained: SET, RigL, gradual pruning, whatever its statements ask for."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from surgery.compiler.record import record_of
from surgery.errors import GraphError
from surgery.operations.subnetwork import Scheduled
from surgery.training.masks import MaskedWeight, hold_zeros, weights_of
from surgery.training.moments import bare, forget


def schedule(model: nn.Module, optimizer: Any, steps: int | None = None) -> Schedule:
    """The schedule of the program that was applied to a model: call its `step` once for each step of the optimizer.

    Between the backward pass and the optimizer's step, before gradients are clipped:

        loss.backward()
        schedule.step()
        optimizer.step()
        optimizer.zero_grad()

    With a gradient scaler, call its `unscale_` first.

    optimizer: torch's or bitsandbytes', over the weights that the program trains (`surgery.parameters(model)`).
    steps: of the whole training, where a statement ends at a share of it.
    Errors: GraphError S370 the model was not transformed, S372 nothing in its program has a schedule, S373 a schedule
    that ends before it starts, or whose end is not known, S374 the optimizer does not step the weights.
    """
    record = record_of(model)
    if record is None:
        raise GraphError.of(
            "S370",
            "the model was not transformed, or has been merged: no program says how to train it",
            help="apply a program with a statement such as `sparse rigl 80% on ffn`",
        )
    works = [
        Work(step.operation, weights_of(step, model, record.plan.program.seed), step.operation.ending(steps))
        for step in record.plan.steps
        if isinstance(step.operation, Scheduled) and step.operation.scheduled
    ]
    if not works:
        raise GraphError.of(
            "S372",
            "nothing in the program that was applied to this model has a schedule",
            help="say `sparse rigl 80% on ffn`, or `prune magnitude 0% to 80% over 2000 steps on ffn`",
        )
    hold_zeros(model, bare(optimizer))
    return Schedule(works, bare(optimizer))


@dataclass
class Work:
    """One statement. dense: gradients of all its weights, where the optimizer was about to step without them."""

    operation: Scheduled
    weights: Sequence[MaskedWeight]
    length: int | None
    dense: list[Tensor] = field(default_factory=list)


class Schedule:
    """Counts steps, and changes masks at those that the statements name."""

    def __init__(self, works: Sequence[Work], optimizer: Any) -> None:
        self.works, self.optimizer, self.count = works, optimizer, 0
        stepped = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
        for each in (each for work in works for each in work.weights):
            if each.split:
                raise GraphError.of(
                    "S374",
                    f"{each.part.path} is split over processes, and its mask is chosen of all of it",
                    help="train with data parallelism, which keeps it whole",
                )
            if id(each.weight) not in stepped:
                raise GraphError.of(
                    "S374",
                    f"the optimizer does not step the weight of {each.part.path}",
                    help="make it after the program was applied, over surgery.parameters(model).values()",
                )
        self._guard()
        self._ask()

    def step(self) -> bool:
        """Count one step of the optimizer, and change the masks whose turn it is; whether any has changed.

        Where RigL swaps weights, that takes the place of the optimizer's step: every gradient is dropped. Weights that
        go and weights that come are zero, and all of the optimizer's moments of them too. A gradient that is not finite
        (of a scaled loss) swaps nothing.
        """
        self.count += 1
        changed = [self._turn(work) for work in self.works if work.operation.turns(self.count, work.length)]
        self._ask()
        return any(changed)

    def state_dict(self) -> dict[str, Any]:
        """The number of steps made. Masks are saved with the model, and what is drawn at a step hangs on its number."""
        return {"step": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another schedule was, of a model with the same masks."""
        self.count = int(state["step"])
        self._ask()

    def _turn(self, work: Work) -> bool:
        operation, weights = work.operation, work.weights
        gradients = self._gradients(work) if operation.asks_gradient else []
        if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            _leave_kept(work)
            return False
        before = [each.mask() for each in weights]
        values = [each.lie(each.weight.detach()) for each in weights]
        generators = [each.generator(self.count) for each in weights]
        after = operation.masks(self.count, work.length, before, values, gradients, generators)
        for each, mask in zip(weights, after, strict=True):
            same = each.put(mask, self.count)
            forget(self.optimizer, each.weight, same)
            if each.weight.grad is not None:
                each.weight.grad.masked_fill_(~same, 0)
        if operation.asks_gradient:
            for tensor in (tensor for group in self.optimizer.param_groups for tensor in group["params"]):
                tensor.grad = None
        return any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))

    def _gradients(self, work: Work) -> list[Tensor]:
        """(out, in) of each weight, zeros included."""
        found, work.dense = work.dense, []
        if found:
            return found
        for each in work.weights:
            if each.weight.grad is None:
                raise GraphError.of(
                    "S374",
                    f"{each.part.path} has no gradient at a step whose swap is chosen by it",
                    help="call `schedule.step()` after the backward pass and before gradients are set to zero",
                )
            found.append(each.lie(each.weight.grad))
        return found

    def _ask(self) -> None:
        """Let the backward passes of the next step give what its swaps need, and those of other steps no more."""
        for work in self.works:
            due = work.operation.asks_gradient and work.operation.turns(self.count + 1, work.length)
            work.dense = []
            for each in work.weights:
                each.ask(due)

    def _guard(self) -> None:
        """An optimizer that steps before the schedule must not see gradients of masked weights."""
        watched = weakref.ref(self)

        def before_step(*_: Any) -> None:
            alive = watched()
            if alive is not None:
                alive._take()

        asked = any(work.operation.asks_gradient for work in self.works)
        if asked and hasattr(self.optimizer, "register_step_pre_hook"):
            self.optimizer.register_step_pre_hook(before_step)

    def _take(self) -> None:
        """Keep the gradients that the next swap needs, and leave the optimizer those of what is kept."""
        for work in self.works:
            due = work.operation.asks_gradient and work.operation.turns(self.count + 1, work.length)
            if due and any(_is_dense(each) for each in work.weights):  # else it is still the step before's
                work.dense = [gradient.clone() for gradient in self._gradients(work)]
                _leave_kept(work)


def _is_dense(each: MaskedWeight) -> bool:
    """Whether the gradient of a weight is that of every entry."""
    gradient = each.weight.grad
    return gradient is not None and bool(each.lie(gradient)[~each.mask()].any())


def _leave_kept(work: Work) -> None:
    """Set to zero the gradients of what masks do not keep."""
    for each in work.weights:
        if each.weight.grad is not None:
            each.weight.grad.masked_fill_(~each.lie(each.mask()), 0)
