"""Promises about the model as a whole: attention, the frame, saving and loading, a text against its prefix."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.anatomy.parts import Part
from surgery.compiler.plan import Step
from surgery.compiler.record import parameters, record_of
from surgery.graph.edge import Edge
from surgery.graph.edge import attached as attached_edge
from surgery.graph.fingerprint import changed, fingerprints
from surgery.graph.module import Rewritten, rewritten
from surgery.graph.site import tensor_name
from surgery.verify.report import Finding
from surgery.verify.subject import Subject

ROUND_TRIP_LIMIT = 2 << 30
"""Bytes up to which a model is written to a temporary directory and read again."""
ALIGNED = 64


def attention_off_means_off(subject: Subject) -> Iterator[Finding]:
    """With what is attached to attention switched off and on again, the model gives the bits it gave before."""
    steps = [step for step in attention_steps(subject) if "off_means_off" in step.operation.promises()]
    if not steps:
        return
    statements = "; ".join(str(step.statement) for step in steps)
    if not subject.runs:
        yield _not_run("off_means_off", statements)
        return
    on = subject.output()
    with attention_switched(subject.model):
        off = subject.output()
    again = subject.output()
    yield Finding("off_means_off", "attention", float((again != on).sum()), 0.0, statements, "on again")
    if not any(getattr(step.operation, "gated", False) for step in steps) and torch.equal(on, off):
        yield Finding("off_means_off", "attention", float("inf"), 1.0, statements, "what was attached has no effect")


def attention_identity(subject: Subject) -> Iterator[Finding]:
    """Attention statements that promise it: with their tensors as they start, on and off give the same bits."""
    steps = [step for step in attention_steps(subject) if "identity_at_init" in step.operation.promises()]
    if not steps:
        return
    statements = "; ".join(str(step.statement) for step in steps)
    others = [step for step in attention_steps(subject) if step not in steps]
    if not subject.runs or others:
        reason = f"`{others[0].statement}` is at the same attention calls" if others else "no inputs to run it on"
        yield Finding("identity_at_init", "attention", statement=statements, skipped=reason)
        return
    with _gates_closed(subject.model):
        on = subject.output()
        with attention_switched(subject.model):
            off = subject.output()
    sites = sum(len(step.parts) for step in steps)
    yield Finding("identity_at_init", "attention", float((on != off).sum()), 0.0, statements, sites=sites)


def complete(subject: Subject) -> Iterator[Finding]:
    """Every part of every statement is rewritten in the model that runs."""
    for step in subject.steps:
        parts = [part for part in step.parts if step.operation.rewrites(part)]
        attached = step.operation.phase == "attach"
        missing = [part.path for part in parts if not _has(subject.model, part, str(step.statement), attached)]
        note = f"{len(missing)} of {len(parts)} places do not have it" if missing else ""
        place = missing[0] if missing else "model"
        yield Finding("complete", place, len(missing), 0.0, str(step.statement), note, sites=len(parts))


def _has(model: nn.Module, part: Part, statement: str, attached: bool) -> bool:
    """Whether the module at a part is rewritten; of what is attached, whether its nodes are in the code too.

    A mask has none where its weight has become codes.
    """
    module = model.get_submodule(part.path)
    held = [module, *module.children()] if part.kind in ("attention", "entry", "experts") else [module]
    if part.kind == "edge":
        held = [edge for edge in [attached_edge(model, part)] if edge is not None]
    graphs = [each.full for each in held if isinstance(each, Rewritten)]
    written = {node.meta.get("statement") for graph in graphs for node in graph.nodes}
    return statement in written if attached else bool(graphs)


def frame(subject: Subject) -> Iterator[Finding]:
    """What was not selected has the bits it had, and only what the program declared is trained."""
    record = record_of(subject.model)
    declared = set(parameters(subject.model))
    trained = {name for name, parameter in subject.model.named_parameters() if parameter.requires_grad}
    for name in sorted(trained - declared):
        yield Finding("frame", name, float("inf"), 1.0, note="it is trained, and no statement says so")
    if record is None or not record.start:
        yield Finding("frame", "model", skipped="nothing is known of how it was")
        return
    moved = changed(record.untouched, subject.model)
    yield Finding("frame", moved[0] if moved else "model", len(moved), 0.0, note="tensors that no statement selected")
    moving = _moving(subject)
    frozen = {name: print_ for name, print_ in record.start.items() if name not in trained | declared | moving}
    moved = changed(frozen, subject.model)
    yield Finding("frame", moved[0] if moved else "model", len(moved), 0.0, note="frozen tensors since it was applied")


def _moving(subject: Subject) -> set[str]:
    """Names of buffers that a schedule writes to."""
    return {
        f"{part.path}.{tensor_name(name, part, step.statement.name)}"
        for step in subject.plan.steps
        for part in step.parts
        for name in step.operation.moving
    }


def round_trip(subject: Subject) -> Iterator[Finding]:
    """Saved and loaded, every tensor and the output have the same bits."""
    from surgery.checkpoint.load import load
    from surgery.checkpoint.save import bytes_of, save
    from surgery.errors import CheckpointError

    model = subject.model
    if any(tensor.is_meta for tensor in model.parameters()):
        yield Finding("round_trip", "model", skipped="there are no weights")
        return
    if bytes_of(model) > ROUND_TRIP_LIMIT:
        yield Finding("round_trip", "model", skipped=f"it is larger than {ROUND_TRIP_LIMIT >> 30} GB")
        return
    with tempfile.TemporaryDirectory() as directory:
        try:
            save(model, Path(directory) / "model")
            loaded = load(Path(directory) / "model")
        except CheckpointError as error:
            if error.diagnostics[0].code in ("S444", "S421"):
                yield Finding("round_trip", "model", skipped=error.diagnostics[0].message)
                return
            yield Finding("round_trip", "model", float("inf"), 1.0, note=error.diagnostics[0].message)
            return
    device = next(iter(model.parameters())).device
    wrong = changed(fingerprints(model), loaded)
    yield Finding("round_trip", wrong[0] if wrong else "model", len(wrong), 0.0, note="tensors")
    if subject.runs:
        given = (subject.plan, subject.args, subject.kwargs, None, subject.seed)
        with aligned(model):
            error_count = float((Subject(loaded.to(device), *given).output() != Subject(model, *given).output()).sum())
        yield Finding("round_trip", "model", error_count, 0.0, note="numbers of the output")


@contextmanager
def aligned(model: nn.Module) -> Iterator[None]:
    """Inside, all tensors lie as the allocator places them: those mapped from a file may be summed in another order."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    moved = [(tensor, tensor.data) for tensor in tensors.values() if tensor.data_ptr() % ALIGNED]
    try:
        for tensor, data in moved:
            tensor.data = data.clone()
        yield
    finally:
        for tensor, data in moved:
            tensor.data = data


def attention_steps(subject: Subject) -> list[Step]:
    kinds = ("attention", "entry")
    return [step for step in subject.steps if any(part.kind in kinds for part in step.parts)]


def _not_run(promise: str, statement: str) -> Finding:
    return Finding(promise, "model", statement=statement, skipped="no inputs to run it on (pass example_inputs=...)")


def _attention_sites(model: nn.Module) -> list[tuple[str, Rewritten]]:
    return [
        (path, module) for path, module in rewritten(model) if module.facts is None and not isinstance(module, Edge)
    ]


@contextmanager
def attention_switched(model: nn.Module) -> Iterator[None]:
    """Everything that is attached to attention off, and only that."""
    before = [(module, module.off) for _, module in _attention_sites(model)]
    try:
        for module, _ in before:
            module.switch({None})
        yield
    finally:
        for module, off in before:
            module.switch(off)


@contextmanager
def _gates_closed(model: nn.Module) -> Iterator[None]:
    """Gates as they start, at zero; afterwards they have the very storage they had."""
    gates: list[tuple[Any, Tensor]] = []
    for _, module in _attention_sites(model):
        gates += [(p, p.data) for name, p in module.named_parameters() if name in module.added and "gate" in name]
    try:
        for parameter, data in gates:
            parameter.data = torch.zeros_like(data)
        yield
    finally:
        for parameter, data in gates:
            parameter.data = data
