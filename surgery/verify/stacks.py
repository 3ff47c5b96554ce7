"""Promises of experts' stacked weights: as they are stored at the start and when switched off, exact when merged."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from surgery.anatomy.parts import Part
from surgery.compiler.plan import Step
from surgery.graph.stack import CHILD, StackDraft, Stacks, StackSite, fold_into
from surgery.verify.report import Finding
from surgery.verify.subject import Subject


def stack_identity(subject: Subject) -> Iterator[Finding]:
    """Every statement that promises it, attached afresh, lets the module read the bits that it stores."""
    for step, part, module, sites in _distinct(subject):
        if "identity_at_init" not in step.operation.promises():
            continue
        draft = StackDraft(module, part, anew=True)
        site = StackSite(draft, part, str(step.statement), step.statement.name, step.operation.verb, subject.seed)
        step.operation.rewrite(site)
        made = draft.finish().eval()
        error = _differing(_read(made, module), _stored(made, module))
        yield Finding("identity_at_init", part.path, error, 0.0, str(step.statement), sites=sites)


def stack_off_means_off(subject: Subject) -> Iterator[Finding]:
    """Switched off, the module reads what it stores; switched on again, what it read before."""
    for step, part, module, sites in _distinct(subject):
        if "off_means_off" not in step.operation.promises():
            continue
        made, statement = _randomised(subject, module, part), str(step.statement)
        on = _read(made, module)
        made.switch({None})
        off = _read(made, module)
        made.switch(frozenset())
        yield _finding("off_means_off", part, _differing(off, _stored(made, module)), statement, "off", sites)
        yield _finding("off_means_off", part, _differing(_read(made, module), on), statement, "on again", sites)
        if not _differing(on, off):
            yield _finding("off_means_off", part, float("inf"), statement, "what was attached has no effect", sites)


def stack_merges(subject: Subject) -> Iterator[Finding]:
    """A merged module stores, to the bit, what it read before."""
    for step, part, module, sites in _distinct(subject):
        if "merges" not in step.operation.promises():
            continue
        copied = copy.deepcopy(module)
        made = _randomised(subject, copied, part)
        copied._modules[CHILD] = made
        wanted = _read(made, copied)
        fold_into(copied, frozenset(made.branches()))
        found = [copied._parameters[name] for name in made.names]
        error = _differing([each for each in found if each is not None], wanted)
        yield _finding("merges", part, error, str(step.statement), "merged against read", sites)


def _finding(promise: str, part: Part, error: float, statement: str, note: str, sites: int) -> Finding:
    return Finding(promise, part.path, error, 0.0, statement, note, sites=sites)


def _distinct(subject: Subject) -> list[tuple[Step, Part, nn.Module, int]]:
    """One module of each kind for each statement and stack, and how many there are of it."""
    groups: dict[object, list[tuple[Step, Part, nn.Module]]] = {}
    for step in subject.steps:
        for part in step.parts:
            module = subject.model.get_submodule(part.path)
            made = module._modules.get(CHILD)
            if part.kind == "experts" and isinstance(made, Stacks):
                tensors = tuple((name, tensor.shape, tensor.dtype) for name, tensor in made.named_parameters())
                key = (str(step.statement), part.role, part.parameter, part.shape, tensors, str(made.full))
                groups.setdefault(key, []).append((step, part, module))
    return [(*group[0], len(group)) for group in groups.values()]


def _randomised(subject: Subject, module: nn.Module, part: Part) -> Stacks:
    made: Stacks = copy.deepcopy(module._modules[CHILD]).eval()  # type: ignore[union-attr,assignment]
    subject.randomise(made, part.path)
    return made


def _stored(made: Stacks, module: nn.Module) -> list[Tensor]:
    return [tensor for name in made.names if (tensor := module._parameters[name]) is not None]


def _read(made: Stacks, module: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        return list(made(*_stored(made, module)))


def _differing(found: list[Tensor], wanted: list[Tensor]) -> float:
    """How many numbers differ."""
    if [(each.shape, each.dtype) for each in found] != [(each.shape, each.dtype) for each in wanted]:
        return float("inf")
    return float(sum(int((one != other).sum()) for one, other in zip(found, wanted, strict=True)))
