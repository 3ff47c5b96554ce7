"""Which of the base's tensors are trained: what `train` statements say, less what `freeze` statements take out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from surgery.errors import Diagnostic, PlanError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from surgery.anatomy.parts import Part
    from surgery.compiler.plan import Plan, Step


def settle(steps: Sequence[Step], model: nn.Module) -> tuple[tuple[Step, ...], tuple[str, ...]]:
    """The steps with every training one less what is frozen, and what to warn of.

    Errors: PlanError S114 where a weight kept as codes would be trained, S115 where nothing is left to train.
    """
    freezing = {_key(model, part): step for step in steps if step.operation.freezes for part in step.parts}
    used: set[object] = set()
    settled: list[Step] = []
    problems: list[Diagnostic] = []
    for step in steps:
        if step.operation.phase == "train" and not step.operation.freezes and step.parts:
            takers = [freezing.get(_key(model, part)) for part in step.parts]
            left = tuple(part for part, taker in zip(step.parts, takers, strict=True) if taker is None)
            gone = {str(taker.statement): taker for taker in takers if taker is not None}
            used |= {_key(model, part) for part, taker in zip(step.parts, takers, strict=True) if taker is not None}
            if not left:
                problems.append(_nothing_left(step, next(iter(gone.values()))))
            step = replace(step, parts=left)
        elif not step.operation.freezes:
            problems += _frozen(step, freezing, model)
        problems += _quantized(step, step.parts, steps)
        settled.append(step)
    if problems:
        raise PlanError(*problems)
    freezers = [step for step in settled if step.operation.freezes]
    idle = [step.statement for step in freezers if used.isdisjoint(_key(model, part) for part in step.parts)]
    for step in freezers:  # of the biases that do not exist only those that somebody would add
        kept = tuple(part for part in step.parts if part.role != "bias.new" or _key(model, part) in used)
        settled[settled.index(step)] = replace(step, parts=kept)
    return tuple(settled), tuple(f"`{statement}` takes nothing out: no `train` statement says it" for statement in idle)


def idle_optimizers(steps: Iterable[Step], trainable: int) -> tuple[Diagnostic, ...]:
    """An error for every statement that says how to train in a program that trains nothing (S115)."""
    return tuple(
        Diagnostic(
            "S115",
            f"`{step.statement}` has nothing to train",
            step.statement.span,
            help="say what is trained, with `lora`, `train` or another method",
        )
        for step in steps
        if "optimizer" in step.operation.claims(step.statement.name) and not trainable
    )


def tensors(steps: Iterable[Step], model: nn.Module) -> dict[int, Tensor]:
    """The base's tensors that these steps train, each once whatever its places, by id."""
    found: dict[int, Tensor] = {}
    for step in steps:
        for part in step.parts:
            if step.operation.trains(part):
                tensor = _tensor(model, part)
                if tensor is not None:
                    found[id(tensor)] = tensor
    return found


def count(steps: Sequence[Step], model: nn.Module) -> int:
    """How many numbers of the base these steps train, each once; what a mask holds at zero is not trained."""
    zeros: dict[int, int] = {}
    for step in steps:
        for part in step.parts:
            if step.operation.trains(part):  # else it may be in a layer that is no more
                key = id(_tensor(model, part))
                zeros[key] = max(step.operation.untrained(part), zeros.get(key, 0))
    return sum(tensor.numel() - zeros[key] for key, tensor in tensors(steps, model).items())


def trained(plan: Plan, model: nn.Module) -> dict[str, Tensor]:
    """The same of a transformed model by full name; of a tensor in several places the first name."""
    wanted = tensors(plan.steps, model)
    return {name: tensor for name, tensor in model.named_parameters() if id(tensor) in wanted}


def declare(plan: Plan, model: nn.Module) -> None:
    """Ask for gradients of what the plan trains; everything else is left as it is."""
    for tensor in tensors(plan.steps, model).values():
        tensor.requires_grad_(True)


def _tensor(model: nn.Module, part: Part) -> Tensor | None:
    return model.get_submodule(part.path)._parameters.get(part.parameter)


def _key(model: nn.Module, part: Part) -> object:
    """Equal for parts that are one tensor; a bias that is yet to be added is known by its place."""
    tensor = None if part.role == "bias.new" else _tensor(model, part)
    return (part.path, part.role) if tensor is None else id(tensor)


def _nothing_left(step: Step, taker: Step) -> Diagnostic:
    return Diagnostic(
        "S115",
        f"`{step.statement}` trains nothing: `{taker.statement}` takes out all of it",
        _newer(step, taker).statement.span,
        label=_other(step, taker),
        help="leave one of the two out, or narrow `freeze` with `in` or `except`",
    )


def _frozen(step: Step, freezing: Mapping[object, Step], model: nn.Module) -> list[Diagnostic]:
    """One diagnostic where a statement that trains weights by the way of its method is to leave some frozen."""
    for part in step.parts:
        taker = freezing.get(_key(model, part)) if step.operation.trains(part) else None
        if taker is not None:
            said = f"`{step.statement}` trains what `{taker.statement}` takes out: {part.path}"
            span = _newer(step, taker).statement.span
            help = "leave the place out of one of them with `except`"
            return [Diagnostic("S115", said, span, label=_other(step, taker), help=help)]
    return []


def _quantized(step: Step, parts: Sequence[Part], steps: Sequence[Step]) -> list[Diagnostic]:
    """One diagnostic for each statement that keeps a weight as codes which this one would train."""
    found = []
    for other in steps:
        if other.operation.phase != "quantize":
            continue
        codes = {(part.path, part.parameter) for part in other.parts}
        both = [part for part in parts if step.operation.trains(part) and (part.path, part.parameter) in codes]
        if both:
            found.append(
                Diagnostic(
                    "S114",
                    f"`{step.statement}` trains what `{other.statement}` keeps as codes: {both[0].path}",
                    _newer(step, other).statement.span,
                    label=f"{len(both)} such place{'s' * (len(both) > 1)}; {_other(step, other)}",
                    help="leave the place out of one of them with `except`, or train `lora` on it",
                )
            )
    return found


def _newer(one: Step, other: Step) -> Step:
    """Of two statements the one to point at: one of a program before has no text here."""
    return other if one.standing else one


def _other(one: Step, other: Step) -> str:
    older = one if one.standing else other
    return f"the other statement is {'of the program before' if older.standing else f'at {older.statement.span}'}"
