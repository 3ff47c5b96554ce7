"""What a program means for a model: which operation at which parts, in which order, at what cost. Reads shapes only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

from surgery.anatomy import select, study
from surgery.anatomy.inputs import check_model
from surgery.anatomy.parts import Anatomy, Part, Stack
from surgery.compiler.conflicts import conflicts
from surgery.compiler.inplace import read_in_place
from surgery.compiler.shared import at_one_place, elsewhere, standings
from surgery.compiler.stacks import broken_rows
from surgery.compiler.training import idle_optimizers, settle
from surgery.errors import Diagnostic, PlanError, SurgeryError, standing_at
from surgery.graph.attention_text import check_known
from surgery.language.program import Program, Statement
from surgery.language.selector import Union
from surgery.operations.base import Operation, Phase

if TYPE_CHECKING:
    from torch import nn

    from surgery.compiler.cost import Cost
    from surgery.compiler.record import Record
    from surgery.compiler.reshape import Reshaped

PHASES = get_args(Phase)
NOTHING = Union(())


@dataclass(frozen=True)
class Step:
    """One statement with the parts it found, in execution order. standing: an earlier program has done it."""

    statement: Statement
    parts: tuple[Part, ...]
    standing: bool = False

    @property
    def operation(self) -> Operation:
        return self.statement.operation

    def to_json(self) -> dict[str, Any]:
        operation = self.operation
        return {
            "statement": str(self.statement),
            "phase": operation.phase,
            "merge": operation.on_merge,
            "promises": list(operation.promises()),
            "parts": [part.to_json() for part in self.parts],
            **({"notes": list(operation.notes()), "sizes": operation.sizes()} if operation.sizes() else {}),
            **({"freezes": True} if operation.freezes else {}),
            **({"standing": True} if self.standing else {}),
            **({"sign": operation.sign} if operation.sign != "~" else {}),
        }


@dataclass(frozen=True)
class Plan:
    """Steps in the order in which they are done, which does not depend on the order of the statements.

    anatomy: of the model that most steps act on. given: of the model before, where some steps reshape it.
    """

    program: Program
    anatomy: Anatomy
    steps: tuple[Step, ...]
    cost: Cost
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    given: Anatomy | None = None

    @property
    def reshaping(self) -> tuple[Step, ...]:
        """The steps that change the model itself, in order; their parts are of the model as it was given."""
        return tuple(step for step in self.steps if step.operation.reshapes())

    @property
    def places(self) -> int:
        """How many places are rewritten, each counted once for every step that acts there."""
        return sum(len(step.parts) for step in self.steps)

    def __str__(self) -> str:
        from surgery.compiler.show import show

        return show(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Everything that the text shows, the resolved parts, and the anatomy, on which a later program is planned."""
        return {
            "format": 1,
            "model": self.anatomy.model,
            **_anatomy_json(self.anatomy),
            **({"given": _anatomy_json(self.given)} if self.given is not None else {}),
            "program": str(self.program),
            "seed": self.program.seed,
            "steps": [
                {**step.to_json(), **costs} for step, costs in zip(self.steps, self.cost.steps_json(), strict=True)
            ],
            "totals": self.cost.totals_json(),
            "warnings": list(self.warnings),
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """A plan that was written down, for `perform` to repeat. ProgramError when its statements do not parse."""
        from surgery.compiler.cost import Cost
        from surgery.language import parse

        anatomy = _read_anatomy(data)
        given = _read_anatomy({"model": data["model"], **data["given"]}) if "given" in data else None
        steps = tuple(
            Step(_read(step["statement"], step.get("sizes", {})), tuple(map(Part.from_json, step["parts"])))
            for step in data["steps"]
        )
        program = replace(parse(data["program"]), seed=data["seed"])
        told = tuple(data["warnings"]), tuple(data.get("notes", ()))
        return cls(program, anatomy, steps, Cost.from_json(data), *told, given)


def not_a_program(given: object) -> PlanError:
    """What to say of something else in its place: most often a text, or the model."""
    help = "surgery.parse(text) and surgery.load_program(path) give one"
    if hasattr(given, "named_modules"):
        help = "the program comes first, then the model"
    return PlanError.of("S100", f"not a program: {type(given).__name__}", help=help)


def _anatomy_json(anatomy: Anatomy) -> dict[str, Any]:
    return {
        "stacks": [[stack.name, stack.path, stack.depth] for stack in anatomy.stacks],
        "anatomy": [part.to_json() for part in anatomy.parts],
    }


def _read_anatomy(data: Mapping[str, Any]) -> Anatomy:
    stacks = tuple(Stack(*stack) for stack in data["stacks"])
    return Anatomy(data["model"], stacks, tuple(map(Part.from_json, data["anatomy"])))


def _read(text: str, sizes: dict[str, Any]) -> Statement:
    """A step's statement, with what was decided when it was planned."""
    from surgery.language import parse

    statement = parse(text).statements[0]
    return replace(statement, operation=statement.operation.resized(sizes))


def plan(
    program: Program,
    model: nn.Module,
    *,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    anatomy: Anatomy | None = None,
) -> Plan:
    """Resolve a program on a model, live or on the meta device, without changing it.

    Of a model that was transformed before, the plan is that of both programs as one.

    example_inputs: what a plain torch module is called with. anatomy: a study of this model, when there is one already.
    Errors: ModelError (no model, cannot be studied, or has no such part), PlanError (no program, or it does not fit,
    S100 to S106), all at once; PromiseError S502 where shapes tell that a `require` statement will not hold.
    """
    from surgery.compiler import again, required
    from surgery.compiler.cost import measure
    from surgery.compiler.record import record_of
    from surgery.compiler.warnings import warnings
    from surgery.graph.attention_calls import observed

    if not isinstance(program, Program):
        raise not_a_program(program)
    check_model(model)
    record = record_of(model)
    if record is None:
        anatomy = observed(anatomy or study(model, example_inputs), model, example_inputs)
    else:
        anatomy = again.retied(record.plan.anatomy, model)
    if tokenizer is not None:
        program = replace(program, statements=tuple(_told(each, tokenizer, anatomy) for each in program.statements))
    given, shape = anatomy, None
    first, shared = _steps([each for each in program.statements if each.operation.reshapes()], given, model)
    if first:
        first, shape = _reshaped(_ordered(first), record, model, given, example_inputs)
        model, anatomy = shape.model, shape.anatomy
    rest = [each for each in program.statements if not each.operation.reshapes()]
    resolved, others = _steps(rest, anatomy, model)
    if record is not None:
        program = again.joined(record.plan.program, program)
        resolved += [replace(step, standing=True) for step in record.plan.steps]
    steps, idle = settle(_ordered([*first, *resolved]), model)
    found = conflicts(steps) or broken_rows(steps)
    if record is not None and not found:
        found = again.too_late(steps, record, model)
    if found:
        raise PlanError(*found)
    cost = measure(steps, model, program.seed, None if record is None else record.plan.cost)
    if shape is not None:
        cost = cost.after(shape.changed)
    foreseen = required.foresee(steps, cost, record is not None)
    found = idle_optimizers(steps, cost.trainable)
    if found:
        raise PlanError(*found)
    acting = [step for step in steps if not step.operation.reshapes()]
    told = (*shared, *others, *idle, *(text for _, text in cost.unmerged), *warnings(acting, anatomy, model))
    notes = (*(note for step in acting for note in _chosen_by(step, anatomy, model)), *foreseen)
    if shape is not None:
        told, notes = (*shape.told, *told), (*notes, *shape.loaded)
    before = given if shape is not None else None if record is None else record.plan.given
    return Plan(program, anatomy, steps, cost, tuple(dict.fromkeys(told)), notes, before)


def _reshaped(
    steps: list[Step], record: Record | None, model: nn.Module, anatomy: Anatomy, example_inputs: Any
) -> tuple[list[Step], Reshaped]:
    """The steps as studied, and the model as they leave it. Errors: PlanError S103, S132, S133."""
    from surgery.compiler.reshape import double

    if record is not None:
        raise PlanError.of(
            "S133",
            f"`{steps[0].statement}` reshapes a model on which `{record.plan.steps[0].statement}` acts already",
            steps[0].statement.span,
            help="apply both to the base as one program, or merge the model first",
        )
    found = conflicts(steps)
    if found:
        raise PlanError(*found)
    steps = [_studied(step, model, example_inputs) for step in steps]
    return steps, double(steps, model, anatomy, example_inputs)


def _studied(step: Step, model: nn.Module, example_inputs: Any) -> Step:
    """The step with what its operation has to know of the model that it reshapes; errors stand at the statement."""
    statement = step.statement
    try:
        operation = step.operation.studied(step.parts, model, example_inputs)
        return replace(step, statement=replace(statement, operation=operation))
    except SurgeryError as error:
        raise PlanError(*(replace(each, span=each.span or statement.span) for each in error.diagnostics)) from None


def _ordered(steps: Iterable[Step]) -> list[Step]:
    """As they are carried out: by phase, and in one by their text.

    Of what comes in front of the tokens the nearest goes first: what is joined later counts the places up to its own.
    """
    written = sorted(steps, key=lambda step: str(step.statement))
    nearest = sorted(written, key=lambda step: step.operation.place_in_front(step.statement.name), reverse=True)
    return sorted(nearest, key=lambda step: PHASES.index(step.operation.phase))


def _steps(statements: Iterable[Statement], anatomy: Anatomy, model: nn.Module) -> tuple[list[Step], list[str]]:
    """The statements with their parts, and what to warn of where modules stand in several places."""
    shared = standings(model)
    steps: list[Step] = []
    warnings: list[str] = []
    problems: list[Diagnostic] = []
    for statement in statements:
        try:
            chosen = _chosen(statement.operation.sees(anatomy, model), statement)
            parts = _parts(statement, at_one_place(chosen, shared))
            statement = _sized(statement, parts, model)
        except SurgeryError as error:
            problems += (replace(each, span=each.span or statement.span) for each in error.diagnostics)
            continue
        warnings += elsewhere(statement, chosen, shared)
        problems += _misfits(statement, parts, anatomy)
        steps.append(Step(statement, parts))
    if problems:
        raise PlanError(*problems)
    return steps, warnings


def _chosen(anatomy: Anatomy, statement: Statement) -> tuple[Part, ...]:
    """What the selector finds; nothing for a statement about the whole model, which has none."""
    if statement.operation.acts_on:
        return statement.operation.narrowed(select(anatomy, statement.selector, statement.operation.acts_on))
    if statement.selector != NOTHING:
        raise PlanError.of(
            "S121",
            f"`{statement.operation.verb}` is said of the whole model and acts on no part of it",
            statement.span,
            help="leave the selector out",
        )
    return ()


def _chosen_by(step: Step, anatomy: Anatomy, model: nn.Module) -> tuple[str, ...]:
    """What the statement chose; errors stand at it."""
    with standing_at(step.statement.span):
        return tuple(step.operation.chosen(step.parts, anatomy, model))


def _told(statement: Statement, tokenizer: Any, anatomy: Anatomy) -> Statement:
    """The statement with what its texts decide; errors stand at the statement."""
    with standing_at(statement.span):
        operation = statement.operation.read(tokenizer)
        check_known(operation.ids(tokenizer), anatomy)
        return replace(statement, operation=operation)


def _sized(statement: Statement, parts: Sequence[Part], model: nn.Module) -> Statement:
    """The statement with what its parts decide together; errors stand at the statement."""
    parameters = sum({id(tensor): tensor.numel() for tensor in model.parameters()}.values())
    with standing_at(statement.span):
        return replace(statement, operation=statement.operation.sized(parts, parameters))


def _parts(statement: Statement, parts: tuple[Part, ...]) -> tuple[Part, ...]:
    if statement.operation.granularity != "part":
        parts = tuple(_joined(group) for group in _by_path(parts))
    if statement.expect is not None and statement.expect != len(parts):
        raise PlanError.of(
            "S102",
            f"`expect {statement.expect}`, but the selector finds {len(parts)}",
            statement.span,
            help=f"found: {_listing(parts)}",
        )
    return parts


def _by_path(parts: Iterable[Part]) -> list[list[Part]]:
    groups: dict[tuple[str, str], list[Part]] = {}
    for part in parts:
        groups.setdefault((part.path, part.parameter), []).append(part)
    return list(groups.values())


def _joined(group: Sequence[Part]) -> Part:
    """Parts of one tensor as one: the union of their channels, all of them where they cover it."""
    first = group[0]
    if first.channels is None:
        return first
    runs: list[tuple[int, int]] = []
    for start, stop in sorted(run for part in group for run in part.channels or ()):
        if runs and start <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(stop, runs[-1][1]))
        else:
            runs.append((start, stop))
    channels = None if runs == [(0, first.shape[0])] else tuple(runs)
    names = ",".join(dict.fromkeys(part.name for part in group))
    stem = first.role.rpartition(".")[0]
    return replace(first, role=f"{stem}.{names}" if stem else names, channels=channels)


def _misfits(statement: Statement, parts: Iterable[Part], anatomy: Anatomy) -> list[Diagnostic]:
    """One diagnostic for each reason, naming the first place and counting the others."""
    reasons: dict[str, list[Part]] = {}
    for part in parts:
        operation = statement.operation.at(part)
        reason = operation.fits(part) or (read_in_place(part, anatomy) if operation.rewrites(part) else None)
        if reason is not None:
            reasons.setdefault(reason, []).append(part)
    return [
        Diagnostic(
            "S101",
            f"`{statement.operation.verb}` cannot act on {places[0].place}: {reason}",
            statement.span,
            label=f"{len(places)} such place{'s' * (len(places) > 1)}",
            help="change the value, or leave the place out with `except`",
        )
        for reason, places in reasons.items()
    ]


def _listing(parts: Sequence[Part], most: int = 4) -> str:
    names = [part.place for part in parts[:most]]
    return ", ".join(names) + (f" and {len(parts) - most} more" if len(parts) > most else "")
