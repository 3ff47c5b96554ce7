"""The optimizer that a program names, over exactly what the program trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from surgery.errors import GraphError, standing_at

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from surgery.operations.optimize import Optimize


def optimizer(model: nn.Module) -> Optimizer:
    """The optimizer of the `optimize` statement in the program that was applied to a model.

    It steps `surgery.parameters(model)` and nothing else, matrices with the statement's decay and vectors without, and
    leaves what a mask sets to zero where it is. Its
    state dict is loaded into that of a model from `surgery.load`, to train on as if there had been no pause.
    Errors: GraphError S370 the model was not transformed, S371 its program has no `optimize`; PlanError S116 where the
    statement is strict and this device has a substitute only.
    """
    from surgery.compiler.record import parameters, record_of
    from surgery.operations.optimize import Optimize
    from surgery.training.choice import choose
    from surgery.training.masks import hold_zeros
    from surgery.training.pages import page

    record = record_of(model)
    if record is None:
        raise GraphError.of(
            "S370",
            "the model was not transformed, or has been merged: no program says how to train it",
            help="apply a program with a statement such as `optimize adamw lr 2e-4`",
        )
    step = next((step for step in record.plan.steps if isinstance(step.operation, Optimize)), None)
    if step is None:
        raise GraphError.of(
            "S371",
            "the program that was applied to this model names no optimizer",
            help="say `optimize adamw lr 2e-4`, or build one yourself over surgery.parameters(model).values()",
        )
    operation = step.operation
    assert isinstance(operation, Optimize)
    tensors = list(parameters(model).values())
    choice = choose(operation, tensors[0].device.type)
    with standing_at(step.statement.span):
        choice.allowed(operation)
    made: Any = choice.make(groups(operation, tensors), arguments(operation))
    hold_zeros(model, made)
    return page(made) if choice.mapped else made  # type: ignore[no-any-return]


def groups(operation: Optimize, tensors: list[Tensor]) -> list[dict[str, Any]]:
    """Matrices with the statement's decay, and vectors without any; one group where that is the same."""
    decay = operation.decay if operation.decay is not None else 0.01 if operation.method == "adamw" else 0.0
    split = ([t for t in tensors if t.dim() > 1], [t for t in tensors if t.dim() <= 1])
    if not decay:
        return [{"params": tensors, "weight_decay": 0.0}]
    return [{"params": t, "weight_decay": d} for t, d in zip(split, (decay, 0.0), strict=True) if t]


def arguments(operation: Optimize) -> dict[str, Any]:
    """What the constructor takes besides the parameters, with what is unsaid filled in."""
    given: dict[str, Any] = {"lr": operation.lr}
    if operation.method == "sgd":
        unsaid = 0.9 if operation.narrow else 0.0
        return {**given, "momentum": unsaid if operation.momentum is None else operation.momentum}
    second = 0.99 if operation.method == "lion" else 0.999
    given["betas"] = (_or(operation.beta1, 0.9), _or(operation.beta2, second))
    return given if operation.method == "lion" else {**given, "eps": _or(operation.eps, 1e-8)}


def _or(value: float | None, unsaid: float) -> float:
    return unsaid if value is None else value
