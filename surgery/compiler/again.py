"""A second program on a transformed model: as if both had been one, or refused with the reason.

The statements of both are written again, in the order of their phases, over the base's tensors as they are now. What
the first has put there is kept, trained or not. Where the first would have started from something else had it known of
the second, it starts anew if nothing of it has been trained, and what cannot start anew is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from surgery.compiler.conflicts import overlap
from surgery.errors import Diagnostic, PlanError
from surgery.graph.fingerprint import fingerprint

if TYPE_CHECKING:
    from torch import Tensor, nn

    from surgery.anatomy.parts import Anatomy, Part
    from surgery.compiler.plan import Plan, Step
    from surgery.compiler.record import Record
    from surgery.language.program import Program

WEIGHT = ("weight", "full weight")


def joined(first: Program, second: Program) -> Program:
    """Both as one. A seed that the second does not say is the first's. Error: PlanError S122 for two seeds."""
    if second.seed not in (0, first.seed):
        raise PlanError.of(
            "S122",
            f"`seed {second.seed}` comes too late: the model's tensors were drawn with seed {first.seed}",
            help="leave the seed out, or put all statements into one program",
        )
    return replace(second, statements=(*first.statements, *second.statements), seed=first.seed)


def retied(anatomy: Anatomy, model: nn.Module) -> Anatomy:
    """The anatomy with `tied` as the tensors are now: a merge may have untied some, and codes are tied to nothing."""
    users: dict[int, list[str]] = {}
    for part in anatomy.parts:
        tensor = _tensor(model, part)
        if tensor is not None:
            users.setdefault(id(tensor), []).append(part.path)
    parts = []
    for part in anatomy.parts:
        together = users.get(id(_tensor(model, part)), ())
        parts.append(replace(part, tied=tuple(path for path in part.tied if path in together)))
    return replace(anatomy, parts=tuple(parts))


def too_late(steps: Sequence[Step], record: Record, model: nn.Module) -> tuple[Diagnostic, ...]:
    """Why new statements cannot be as if they had been there from the start: one diagnostic for each such pair."""
    found = []
    for index, new in enumerate(steps):
        for other, standing in enumerate(steps):
            if new.standing or not standing.standing:
                continue
            places = [b for a, b in _common(new, standing) if _reason(new, standing, index < other, b, record, model)]
            if places:
                reason = _reason(new, standing, index < other, places[0], record, model)
                found.append(
                    Diagnostic(
                        "S106",
                        f"`{new.statement}` comes too late after `{standing.statement}` of the program before: "
                        f"at {places[0].path} {reason}",
                        new.statement.span,
                        label=f"{len(places)} such place{'s' * (len(places) > 1)}",
                        help="apply both to the base as one program, or leave the place out with `except`",
                    )
                )
    return tuple(found)


def _reason(new: Step, standing: Step, before: bool, part: Part, record: Record, model: nn.Module) -> str:
    """Why one that would have run before (or after) a standing one cannot at this place; empty where it can."""
    reads = new.operation.starts_from in WEIGHT
    if not before:
        if new.operation.starts_from == "full weight" and standing.operation.phase == "quantize":
            return "the weight that it starts from has become codes"
        return ""
    if standing.operation.phase == "train":
        trained = standing.operation.trains(part) and (reads or new.operation.changes_base)
        return "the weight has been trained, or may have been" if trained and touched(record, model, [part]) else ""
    if standing.operation.changes_base and reads:
        return "the weight that it starts from is no longer there"
    if standing.operation.changes_base and new.operation.changes_base and standing.operation.starts_from in WEIGHT:
        return "what is there was made from a weight that it would have changed"
    return ""


def restarting(plan: Plan, record: Record, model: nn.Module) -> tuple[Step, ...]:
    """Standing steps that would have started from something else, and of which nothing has been trained yet."""
    new = [step for step in plan.steps if not step.standing and any(map(step.operation.rewrites, step.parts))]
    moved = any("identity_at_init" not in step.operation.promises() for step in new)
    found = []
    for index, step in enumerate(plan.steps):
        source = step.operation.starts_from
        earlier = [other for other in plan.steps[:index] if other in new and other.operation.changes_base]
        stale = (source == "model" and moved) or (
            source in WEIGHT and any(True for other in earlier for _ in _common(other, step))
        )
        if step.standing and stale and not any(trained for _, trained in _own(step, record, model)):
            found.append(step)
    return tuple(found)


def touched(record: Record, model: nn.Module, parts: Sequence[Part]) -> bool:
    """Whether a tensor of the base is not what it was when the program had been applied, as far as is known."""
    for part in parts:
        name = f"{part.path}.{part.parameter}" if part.path else part.parameter
        tensor = _tensor(model, part)
        if tensor is not None and record.start.get(name) != fingerprint(tensor):
            return True
    return False


def _own(step: Step, record: Record, model: nn.Module) -> Iterator[tuple[Tensor, bool]]:
    """The trainable tensors that a step put into a model, and whether each is not what it was at the start."""
    from surgery.graph.module import added_parameters, rewritten

    text = str(step.statement)
    mine = {
        id(module._parameters.get(str(node.target)))
        for _, module in rewritten(model)
        for node in module.full.nodes
        if node.op == "get_attr" and node.meta.get("statement") == text
    }
    for name, tensor in added_parameters(model).items():
        if id(tensor) in mine:
            yield tensor, record.start.get(name) != fingerprint(tensor)


def _common(one: Step, other: Step) -> Iterator[tuple[Part, Part]]:
    """Pairs of parts of two steps that have a channel in common."""
    places: dict[tuple[str, str], list[Part]] = {}
    for part in other.parts:
        places.setdefault((part.path, part.parameter), []).append(part)
    for part in one.parts:
        for beside in places.get((part.path, part.parameter), ()):
            if overlap(part, beside):
                yield part, beside


def _tensor(model: nn.Module, part: Part) -> Tensor | None:
    return model.get_submodule(part.path)._parameters.get(part.parameter)
