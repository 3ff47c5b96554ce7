"""What a program requires of its result: foreseen while planning where shapes tell, else measured before it is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from surgery.errors import Diagnostic, PlanError, PromiseError, standing_at
from surgery.graph import zeros
from surgery.operations.require import Require, RequireZeros, Result, Shapes

if TYPE_CHECKING:
    from torch import Tensor, nn

    from surgery.anatomy.parts import Part
    from surgery.compiler.cost import Cost
    from surgery.compiler.plan import Plan, Step


@dataclass(frozen=True)
class Answer:
    """What one statement asks and what was found. holds: None where only the result will show it."""

    step: Step
    found: float
    base: float | None
    holds: bool | None

    @property
    def asked(self) -> str:
        return str(self.step.statement).removeprefix("require ")

    @property
    def said(self) -> str:
        """What was found, in the unit that was asked for."""
        bound = _operation(self.step).bound
        if bound.unit == "%" and not bound.of:
            return f"{self.found:.6%}".rstrip("0%").rstrip(".") + "%" if self.found else "0%"
        text = _size(self.found) if "size" in self.step.operation.verb else f"{self.found:,.6g}"
        return text if not bound.of or not self.base else f"{text}, {self.found / self.base:.4g} of base"


def _size(count: float) -> str:
    from surgery.compiler.show import size

    return size(count)


def _operation(step: Step) -> Require:
    assert isinstance(step.operation, Require)
    return step.operation


def requiring(steps: Sequence[Step]) -> list[Step]:
    """The steps that require something."""
    return [step for step in steps if isinstance(step.operation, Require)]


def foresee(steps: Sequence[Step], cost: Cost, transformed: bool) -> list[str]:
    """What shapes tell of every requirement, one sentence each.

    transformed: the model was, so a base is no longer there to be measured.
    Errors: PromiseError S502 where one will not hold, PlanError S140.
    """
    late = [step for step in requiring(steps) if transformed and _operation(step).asks_base]
    if late:
        raise PlanError(*(_too_late(step) for step in late))
    answers = [_foreseen(step, steps, cost) for step in requiring(steps)]
    _refuse(answers)
    return [_sentence(answer) for answer in answers]


def undecided(plan: Plan) -> list[Step]:
    """The steps that require what only the result's numbers show."""
    return [step for step in requiring(plan.steps) if _foreseen(step, plan.steps, plan.cost).holds is None]


def whole_model(plan: Plan) -> str | None:
    """Why the result is needed at once to measure what is required of it; None where place by place will do."""
    for step in undecided(plan):
        if not isinstance(step.operation, RequireZeros):
            return f"`{step.statement}` is measured by running the result"
    return None


def with_base(plan: Plan, model: nn.Module, tokenizer: Any) -> Plan:
    """The plan with what its requirements compare with, measured of the model as it is now. Errors: S130, S141."""
    steps = []
    for step in plan.steps:
        operation = step.operation
        if isinstance(operation, Require):
            base = Result(model, plan.given or plan.anatomy, tokenizer, 0, 0, partial(zeros.count, model))
            with standing_at(step.statement.span):
                if operation.asks_base:
                    found = operation.measured(base, step.parts)
                    step = replace(
                        step, statement=replace(step.statement, operation=operation.resized({"base": found}))
                    )
                else:
                    operation.prepare(base)
        steps.append(step)
    return replace(plan, steps=tuple(steps))


def measure(plan: Plan, model: nn.Module, tokenizer: Any, steps: Sequence[Step] | None = None) -> list[Answer]:
    """What a transformed model is. steps: those of the plan that are asked, all that require something unless said."""
    from surgery.compiler.training import count
    from surgery.graph.module import added_parameters

    added = sum(tensor.numel() for tensor in added_parameters(model).values())
    trained, total = count(plan.steps, model) + added, plan.cost.parameters + added
    result = Result(model, plan.anatomy, tokenizer, trained, total, partial(zeros.count, model))
    return [_measured(step, result, plan) for step in (requiring(plan.steps) if steps is None else steps)]


def _measured(step: Step, result: Result, plan: Plan) -> Answer:
    operation = _operation(step)
    base = float(plan.cost.bytes_before) if operation.base is None else operation.base
    with standing_at(step.statement.span):
        found = operation.measured(result, step.parts)
    return Answer(step, found, base, operation.bound.holds(found, base))


def check_places(plan: Plan, model: nn.Module, count: Callable[[Part], tuple[int, int]]) -> None:
    """Measure place by place what planning left open. count: zeros and numbers of a part of the result.

    model: the result without numbers. Errors: PromiseError S502.
    """
    result = Result(model, plan.anatomy, None, 0, 0, count)
    late = undecided(plan)
    foreseen = (_foreseen(step, plan.steps, plan.cost) for step in requiring(plan.steps) if step not in late)
    _refuse([*foreseen, *(_measured(step, result, plan) for step in late)])


@contextmanager
def fulfilled(plan: Plan, model: nn.Module, tokenizer: Any) -> Iterator[None]:
    """Whatever makes the result is done inside; where it is not as required, the model is then as it was before.

    Errors: PromiseError S502.
    """
    if not undecided(plan):
        yield
        return
    from surgery.graph.undo import unharmed

    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    kept = [(tensor, tensor.detach().clone()) for tensor in _changed(plan, model)]
    try:
        with unharmed(model):
            yield
            _refuse(measure(plan, model, tokenizer))
    except BaseException:
        for tensor, values in kept:
            tensor.detach().copy_(values)
        for parameter, was in wanted:
            parameter.requires_grad_(was)
        raise


def _changed(plan: Plan, model: nn.Module) -> list[Tensor]:
    """The base's tensors that steps write into; all of them where other steps move them to other places first."""
    found: dict[int, Tensor] = {}
    if plan.reshaping:
        return [*model.parameters(), *model.buffers()]
    for step in plan.steps:
        if step.operation.changes_base:
            for part in step.parts:
                module = model.get_submodule(part.path)
                found.update((id(tensor), tensor) for tensor in module.parameters() if not tensor.is_meta)
                found.update((id(tensor), tensor) for tensor in module.buffers() if not tensor.is_meta)
    return list(found.values())


def _foreseen(step: Step, steps: Sequence[Step], cost: Cost) -> Answer:
    shapes = _shapes(steps, cost)
    found, holds = _operation(step).foreseen(shapes, step.parts)
    return Answer(step, found, float(shapes.before), holds)


def _shapes(steps: Sequence[Step], cost: Cost) -> Shapes:
    totals = cost.parameters + sum(cost.added)
    return Shapes(cost.trainable, totals, cost.bytes_before, cost.bytes_after, lambda part: _zeroed(steps, part))


def _zeroed(steps: Sequence[Step], part: Part) -> int:
    """How many numbers of a part the steps set to zero, at least: masks of one tensor have no row in common."""
    count = 0
    for step in steps:
        for other in step.parts:
            same = (other.path, other.parameter) == (part.path, part.parameter)
            if same and step.operation.phase == "mask" and _within(other, part):
                count += step.operation.zeroed(other) or 0
    return count


def _within(inner: Part, outer: Part) -> bool:
    """Whether all rows of one part are rows of the other."""
    if outer.channels is None:
        return True
    return inner.channels is not None and all(
        any(first <= start and stop <= last for first, last in outer.channels) for start, stop in inner.channels
    )


def _sentence(answer: Answer) -> str:
    if answer.holds is not None:
        return f"`{answer.step.statement}` holds: {answer.said}"
    least = f", and the program makes {answer.said} at least" if answer.found > 0 else ""
    return f"`{answer.step.statement}` is checked on the result{least}"


def _refuse(answers: Sequence[Answer]) -> None:
    """Errors: PromiseError S502, one diagnostic for each that does not hold; the last has the table of all."""
    broken = [answer for answer in answers if answer.holds is False]
    if not broken:
        return
    diagnostics = [_diagnostic(answer) for answer in broken]
    diagnostics[-1] = replace(diagnostics[-1], help=table(answers))
    raise PromiseError(*diagnostics)


def _diagnostic(answer: Answer) -> Diagnostic:
    said = f"the result is not as required: `{answer.asked}`, found {answer.said}"
    return Diagnostic("S502", said, answer.step.statement.span, label=f"found {answer.said}")


def table(answers: Sequence[Answer]) -> str:
    """What was asked and what was found, a line for each."""
    rows = [("required", "found", "")]
    marks = {True: "ok", False: "FAILS", None: "not known yet"}
    rows += [(each.asked, "-" if each.found != each.found else each.said, marks[each.holds]) for each in answers]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines = [f"{row[0].ljust(widths[0])}  {row[1].rjust(widths[1])}  {row[2]}".rstrip() for row in rows]
    return "nothing was changed\n" + "\n".join(f"    {line}" for line in lines)


def _too_late(step: Step) -> Diagnostic:
    return Diagnostic(
        "S140",
        f"`{step.statement}` compares with the base, and the model is no longer the base",
        step.statement.span,
        help="put it into the first program, or say a number: `require perplexity <= 20`",
    )
