"""Check on a user's own model what its program promises: `verify(model)` gives a report of errors and their bounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from surgery.errors import PromiseError
from surgery.verify.report import Finding, Report

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Finding", "Report", "verify"]


def verify(
    model: nn.Module,
    *,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    seed: int = 0,
) -> Report:
    """Check every promise of the program that was applied to a model. The model is left as it was, to the bit.

    example_inputs: what a plain torch module is called with; without them only its places are checked, not the whole.
    tokenizer: reads the texts of `init text`, which is not checked without it.
    seed: of the random numbers that places are tried on.
    Errors: PromiseError S501 when no program was applied to the model, or it has been merged. A promise that does not
    hold is no error here: the report says so and is false.
    """
    from surgery.compiler.record import record_of
    from surgery.verify.promises import ALWAYS, PROMISES
    from surgery.verify.subject import Subject

    record = record_of(model)
    if record is None:
        raise PromiseError.of(
            "S501",
            "this model was not transformed, or has been merged: there is no promise to check",
            help="verify it before merging",
        )
    args, kwargs = _inputs(model, example_inputs)
    subject = Subject(model, record.plan, args, kwargs, tokenizer, seed)
    declared = {name for step in record.plan.steps for name in step.operation.promises()} | set(ALWAYS)
    wanted = [check for name, checks in PROMISES.items() if name in declared for check in checks]
    findings = [finding for check in wanted for finding in check(subject)]
    findings += [
        Finding(name, "model", skipped="no check is known under this name") for name in sorted(declared - set(PROMISES))
    ]
    return Report(tuple(findings))


def _inputs(
    model: nn.Module, example_inputs: tuple[Any, ...] | Mapping[str, Any] | None
) -> tuple[tuple[Any, ...], Mapping[str, Any] | None]:
    """Positional and keyword arguments; None for the latter when there is nothing to call the model with."""
    from surgery.anatomy.inputs import example
    from surgery.errors import ModelError

    if isinstance(example_inputs, Mapping):
        return (), example_inputs
    if example_inputs is not None:
        return tuple(example_inputs), {}
    try:
        return (), example(model)
    except ModelError:
        return (), None
