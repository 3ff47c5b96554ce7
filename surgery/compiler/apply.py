"""Carrying out a plan: statements edit drafts phase by phase, and only then is anything in the model replaced."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import nn

from surgery.anatomy.parts import Anatomy
from surgery.compiler import required
from surgery.compiler.again import restarting
from surgery.compiler.drafts import Drafts, place_of
from surgery.compiler.plan import Plan, Step, not_a_program
from surgery.compiler.plan import plan as make_plan
from surgery.compiler.record import ATTRIBUTE, Record, continued, record_of, trained_since, unselected
from surgery.compiler.reshape import reshape
from surgery.compiler.switch import refuse_routed, rest
from surgery.compiler.training import declare
from surgery.errors import PlanError, standing_at
from surgery.graph import entry, once, soft_entry
from surgery.graph.attention_text import check_known
from surgery.graph.fingerprint import fingerprints
from surgery.graph.module import added_parameters
from surgery.graph.shaping import Shaping
from surgery.graph.undo import unharmed
from surgery.language.program import Program

Model = TypeVar("Model", bound=nn.Module)
Tell = Callable[[int], object]


@dataclass(frozen=True)
class Context:
    """What `fill` and `finish` may use besides their sites."""

    model: nn.Module
    tokenizer: Any
    seed: int
    anatomy: Anatomy


def apply(
    program: Program | Plan,
    model: Model,
    *,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    tell: Tell = lambda amount: None,
) -> Model:
    """Transform a model in place; the same object comes back. What the program adds is trained, all else is frozen.

    A model that was transformed before becomes what it would be had both programs been one; what was trained stays.

    tell: called with the number of places done since its last call, of `plan.places` in all.

    Errors: those of `plan`; PlanError S104 when a text needs a tokenizer and none is given; PromiseError S502 when the
    result is not as a `require` statement says, and then the model is as it was, to the bit: where only the result can
    show that, what the program changes of the base's tensors is kept until it has.
    """
    plan = program
    if not isinstance(plan, Program | Plan):
        raise not_a_program(plan)
    if isinstance(plan, Program):
        plan = make_plan(plan, model, example_inputs=example_inputs, tokenizer=tokenizer)
    check_current(plan, model)
    check_texts(starting(plan, model), tokenizer, plan.anatomy)
    plan = required.with_base(plan, model, tokenizer)
    with required.fulfilled(plan, model, tokenizer):
        return perform(plan, model, tokenizer=tokenizer, inputs=example_inputs, tell=tell)


def check_texts(steps: Iterable[Step], tokenizer: Any, anatomy: Anatomy) -> None:
    """Errors: PlanError S104 when a text needs a tokenizer and there is none, GraphError S352 when it is another's."""
    for step in steps:
        if step.operation.needs_text and tokenizer is None:
            raise PlanError.of(
                "S104",
                f"`{step.statement}` has a text, and there is no tokenizer to read it",
                step.statement.span,
                help="pass tokenizer=..., or use a model directory that has tokenizer files",
            )
        if tokenizer is not None:
            with standing_at(step.statement.span):
                check_known(step.operation.ids(tokenizer), anatomy)


def perform(
    plan: Plan,
    model: Model,
    *,
    hollow: bool = False,
    shaped: bool = False,
    tokenizer: Any = None,
    inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    tell: Tell = lambda amount: None,
) -> Model:
    """Rewrite the model as planned. hollow: structure only, new tensors on the meta device, for loading into.

    shaped: the model has the shape already that the plan gives it.
    Of a model that was transformed before, the places that the plan changes are written again, as one program would.
    """
    refuse_routed(model)
    context = Context(model, tokenizer, plan.program.seed, plan.anatomy)
    reshaping = [] if shaped else [step for step in plan.reshaping if step in starting(plan, model)]
    if not reshaping:
        return _perform(plan, model, context, hollow, tell)
    assert plan.given is not None, "a plan that reshapes knows the model before"
    with unharmed(model):
        config = copy.deepcopy(getattr(model, "config", None))
        shaping = Shaping(model, plan.given, plan.program.seed, tokenizer, hollow, inputs=inputs)
        shape = reshape(reshaping, shaping)
        _perform(plan, model, context, hollow, tell)
        model.__dict__[ATTRIBUTE] = replace(model.__dict__[ATTRIBUTE], shape=shape, config=config)
    return model


def _perform(plan: Plan, model: Model, context: Context, hollow: bool, tell: Tell) -> Model:
    begun = starting(plan, model)
    places = {place_of(part) for step in begun for part in step.parts}
    before = {} if hollow else fingerprints(model, unselected(plan, model))
    drafts = Drafts(model, hollow, plan.program.seed, anew=True)
    sites = []
    for step in plan.steps:
        operation = step.operation
        mine, fills = [], step in begun and not hollow
        for part in step.parts:
            if operation.rewrites(part) and place_of(part) in places:
                with standing_at(step.statement.span):
                    site = drafts.site(step, part, keep=step not in begun)
                    operation.rewrite(site)
                    if fills and not operation.collective:
                        operation.fill([site], context)
                mine.append(site)
            tell(1)
        if fills and operation.collective:
            with standing_at(step.statement.span):
                operation.fill(mine, context)
        sites.append(mine)
    for draft in drafts:
        draft.finish()  # all that can fail has been done when the first of them is installed
    record = record_of(model)
    moved = {} if record is None else trained_since(record, model)
    adapters = [tensor for tensor in added_parameters(model).values() if tensor.requires_grad]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for draft in drafts:
        off = draft.standing.off if draft.standing is not None else frozenset()
        draft.install(model).switch(off)
    for tensor in adapters:
        tensor.requires_grad_(True)
    declare(plan, model)
    rest(model)
    entry.install(model, plan.anatomy.parts)
    soft_entry.install(model, plan.anatomy)
    once.install(model)
    if not hollow:
        for step, mine in zip(plan.steps, sites, strict=True):
            if step in begun:
                with standing_at(step.statement.span):
                    step.operation.finish(mine, context)
    done = replace(plan, steps=tuple(replace(step, standing=False) for step in plan.steps))
    start = {} if hollow else fingerprints(model)
    ids = set(map(id, moved.values()))
    kept = [name for name, tensor in model.named_parameters() if id(tensor) in ids]
    model.__dict__[ATTRIBUTE] = continued(record, Record(done, before, start), kept)
    return model


def starting(plan: Plan, model: nn.Module) -> tuple[Step, ...]:
    """The steps that are done now: all of them, or those that no earlier program has done."""
    record = record_of(model)
    if record is None:
        return plan.steps
    again = restarting(plan, record, model)
    return tuple(step for step in plan.steps if not step.standing or step in again)


def check_current(plan: Plan, model: nn.Module) -> None:
    """Errors: PlanError S123 when the plan was made of the model in another state."""
    record = record_of(model)
    held = Counter(step.statement for step in record.plan.steps) if record is not None else Counter()
    if Counter(step.statement for step in plan.steps if step.standing) != held:
        raise PlanError.of(
            "S123",
            "the plan was made when the model was in another state",
            help="make it again: `surgery.plan(program, model)`",
        )
