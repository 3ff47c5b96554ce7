"""The driver of lottery tickets: rounds of training by whatever function, pruning, and rewinding."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from surgery.compiler.record import parameters, record_of
from surgery.errors import GraphError
from surgery.graph.module import rewritten
from surgery.operations.lottery import Lottery
from surgery.training.masks import weights_of

Model = TypeVar("Model", bound=nn.Module)
Train = Callable[[Model, int, "int | None"], object]


def lottery(model: Model, train: Train[Model], tell: Callable[[int], object] = lambda round: None) -> Model:
    """Find the ticket that the program's `lottery` statement describes, in place; the same object comes back.

    train(model, start, stop): trains from step start up to stop, or to the end where stop is None: with an optimizer of
    its own, the learning rate of that step, and the same data for the same step each time. It is called once up to the
    step of `rewind`, and then once a round from there to the end.
    tell: called after each round with its number, the model being as it was at the step of `rewind`, and sparse. Saved
    then, it can be loaded, and the search goes on with the next round. So is what comes back: train it from there.
    Errors: GraphError S370 the model was not transformed, S372 its program has no `lottery`.
    """
    record = record_of(model)
    if record is None:
        raise GraphError.of(
            "S370",
            "the model was not transformed, or has been merged: no program says how to train it",
            help="apply a program with a statement such as `lottery 80% rounds 5 on ffn`",
        )
    found = [
        (step.operation, weights_of(step, model, record.plan.program.seed))
        for step in record.plan.steps
        if isinstance(step.operation, Lottery)
    ]
    if not found:
        raise GraphError.of(
            "S372",
            "the program that was applied to this model is no lottery",
            help="say `lottery 80% rounds 5 rewind 500 steps on ffn`",
        )
    rewind, rounds = found[0][0].rewind, found[0][0].rounds
    done = max(each.step for _, weights in found for each in weights)
    if rewind and not done:
        train(model, 0, rewind)
    put_back = {**parameters(model), **_own_buffers(model)}
    early = {name: tensor.detach().clone() for name, tensor in put_back.items()}
    for number in range(done + 1, rounds + 1):
        train(model, rewind, None)
        after = [
            operation.masks(number, [w.mask() for w in weights], [w.lie(w.weight.detach()) for w in weights])
            for operation, weights in found
        ]
        with torch.no_grad():
            for name, tensor in put_back.items():
                tensor.copy_(early[name])
        for (_, weights), kept in zip(found, after, strict=True):
            for each, mask in zip(weights, kept, strict=True):
                each.put(mask, number)
        tell(number)
    model.zero_grad(set_to_none=True)
    return model


def _own_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers of the model itself, such as running means, which training changes too."""
    added = {f"{path}.{name}" for path, module in rewritten(model) for name in module.added}
    return {name: tensor for name, tensor in model.named_buffers() if name not in added}
