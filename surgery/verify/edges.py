"""Promises of what hangs on the edges of the residual stream: identity, off means off, and that it is called at all."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from surgery.anatomy.parts import Part
from surgery.compiler.plan import Step
from surgery.graph.edge import Edge, EdgeDraft, EdgeSite, attached
from surgery.verify.report import Finding
from surgery.verify.subject import ROWS, Subject


def edge_identity(subject: Subject) -> Iterator[Finding]:
    """Every statement that promises it, attached afresh to an edge, gives the sub-layer's output to the bit."""
    for (step, part), _, sites in _distinct(subject):
        if "identity_at_init" not in step.operation.promises():
            continue
        draft = EdgeDraft(subject.model, part, anew=True)
        site = EdgeSite(draft, part, str(step.statement), step.statement.name, step.operation.verb, subject.seed)
        step.operation.rewrite(site)
        y, x = _inputs(subject, part)
        with torch.no_grad():
            found = draft.finish().eval()(y, x)
        yield Finding("identity_at_init", part.path, _unequal(found, y), 0.0, str(step.statement), sites=sites)


def edge_off_means_off(subject: Subject) -> Iterator[Finding]:
    """With its branches switched off an edge passes on the bits it gets; on again, it gives those it gave before."""
    for (step, part), edge, sites in _distinct(subject):
        if "off_means_off" not in step.operation.promises():
            continue
        copied = copy.deepcopy(edge).eval()
        subject.randomise(copied, part.path)
        y, x = _inputs(subject, part)
        with torch.no_grad():
            on = copied(y, x)
            copied.switch({None})
            off = copied(y, x)
            copied.switch(frozenset())
            again = copied(y, x)
        statement = str(step.statement)
        yield Finding("off_means_off", part.path, _unequal(off, y), 0.0, statement, "off", "", sites)
        yield Finding("off_means_off", part.path, _unequal(again, on), 0.0, statement, "on again")
        if torch.equal(on, y):
            yield Finding("off_means_off", part.path, float("inf"), 1.0, statement, "what was attached has no effect")


def edges_called(subject: Subject) -> Iterator[Finding]:
    """Where the model can be run, a forward pass goes through every edge."""
    edges = {part.path: edge for _, part, edge in _edges(subject)}
    if not edges or not subject.runs:
        return
    called: set[int] = set()

    def note_call(module: nn.Module, args: object, output: object) -> None:
        called.add(id(module))

    handles = [edge.register_forward_hook(note_call) for edge in edges.values()]
    try:
        subject.output()
    finally:
        for handle in handles:
            handle.remove()
    missed = [path for path, edge in edges.items() if id(edge) not in called]
    note = "the model's forward does not come by" if missed else ""
    yield Finding("complete", missed[0] if missed else "model", len(missed), 0.0, note=note, sites=len(edges))


def _edges(subject: Subject) -> Iterator[tuple[Step, Part, Edge]]:
    for step in subject.steps:
        for part in step.parts:
            edge = attached(subject.model, part) if part.kind == "edge" else None
            if edge is not None:
                yield step, part, edge


def _distinct(subject: Subject) -> list[tuple[tuple[Step, Part], Edge, int]]:
    """One edge of each kind for each statement, and how many there are of it."""
    groups: dict[object, list[tuple[tuple[Step, Part], Edge]]] = {}
    for step, part, edge in _edges(subject):
        tensors = tuple((name, tensor.shape, tensor.dtype) for name, tensor in edge.named_parameters())
        groups.setdefault((str(step.statement), part.role, tensors, str(edge.full)), []).append(((step, part), edge))
    return [(*group[0], len(group)) for group in groups.values()]


def _inputs(subject: Subject, part: Part) -> tuple[Tensor, Tensor]:
    """Random features: what the sub-layer gives, and what it reads."""
    device = next(subject.model.parameters()).device
    like = torch.empty(0, dtype=subject.dtype, device=device)
    y, x = (subject.normal((ROWS, part.shape[0]), like, part.path, name) for name in ("y", "x"))
    return y, x


def _unequal(found: Tensor, wanted: Tensor) -> float:
    """How many numbers differ; -0.0 is 0.0."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return float("inf")
    return float((found != wanted).sum().item())
