"""Carrying out a plan: statements edit drafts phase by phase, and only then is anything in the model replaced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from surgery.compiler.drafts import Drafts
from surgery.compiler.plan import Plan
from surgery.compiler.plan import plan as make_plan
from surgery.compiler.record import ATTRIBUTE, Record, unselected
from surgery.errors import PlanError
from surgery.graph import entry
from surgery.graph.fingerprint import fingerprints
from surgery.language.program import Program

Model = TypeVar("Model", bound=nn.Module)
Tell = Callable[[int], object]


@dataclass(frozen=True)
class Context:
    """What `fill` and `finish` may use besides their sites."""

    model: nn.Module
    tokenizer: Any
    seed: int


def apply(
    program: Program | Plan,
    model: Model,
    *,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    tell: Tell = lambda amount: None,
) -> Model:
    """Transform a model in place; the same object comes back. What the program adds is trained, all else is frozen.

    tell: called with the number of places done since its last call, of `plan.places` in all.

    Errors: those of `plan`; PlanError S104 when a text needs a tokenizer and none is given.
    """
    plan = program
    if isinstance(plan, Program):
        plan = make_plan(plan, model, example_inputs=example_inputs, tokenizer=tokenizer)
    for step in plan.steps:
        if step.operation.needs_text and tokenizer is None:
            raise PlanError.of(
                "S104",
                f"`{step.statement}` has a text, and there is no tokenizer to read it",
                step.statement.span,
                help="pass tokenizer=..., or use a model directory that has tokenizer files",
            )
    return perform(plan, model, tokenizer=tokenizer, tell=tell)


def perform(
    plan: Plan,
    model: Model,
    *,
    hollow: bool = False,
    tokenizer: Any = None,
    tell: Tell = lambda amount: None,
) -> Model:
    """Rewrite the model as planned. hollow: structure only, new tensors on the meta device, for loading into."""
    context = Context(model, tokenizer, plan.program.seed)
    before = {} if hollow else fingerprints(model, unselected(plan, model))
    drafts = Drafts(model, hollow, plan.program.seed)
    sites = []
    for step in plan.steps:
        operation = step.operation
        mine = []
        for part in step.parts:
            if not operation.rewrites(part):
                tell(1)
                continue
            site = drafts.site(step, part)
            operation.rewrite(site)
            mine.append(site)
            if not hollow and not operation.collective:
                operation.fill([site], context)
            tell(1)
        if not hollow and operation.collective:
            operation.fill(mine, context)
        sites.append(mine)
    for draft in drafts:
        draft.finish()  # all that can fail has been done when the first of them is installed
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for draft in drafts:
        draft.install(model)
    entry.install(model, plan.anatomy.parts)
    if not hollow:
        for step, mine in zip(plan.steps, sites, strict=True):
            step.operation.finish(mine, context)
    start = {} if hollow else fingerprints(model)
    model.__dict__[ATTRIBUTE] = Record(plan, before, start)
    return model
