"""A model that lost units computes what the whole one does with those units at zero."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from surgery.compiler.record import record_of
from surgery.errors import SurgeryError
from surgery.graph.cutting import widen
from surgery.graph.module import rewritten
from surgery.graph.partial import looking_at, narrow_norms
from surgery.verify.bounds import merge_bound, relative_error
from surgery.verify.report import Finding
from surgery.verify.subject import Subject

LIMIT = 2 << 30
"""Bytes up to which a model is copied, with zeros where its units were."""


def shrunk_equals_masked(subject: Subject) -> Iterator[Finding]:
    """The model's output against that of a copy with its old widths, zeros in every row and column that was cut out.

    What else the program did is folded into both before they are compared. Where a norm takes its mean of fewer
    channels and cannot make up for it, the copy's looks at those alone; how far that is from a mean of all is told,
    not promised.
    """
    steps: list[Any] = [s for s in subject.plan.reshaping if "shrunk_equals_masked" in s.operation.promises()]
    if not steps:
        return
    statement = "; ".join(str(step.statement) for step in steps)
    skipped = _unchecked(subject)
    if skipped:
        yield Finding("shrunk_equals_masked", "model", statement=statement, skipped=skipped)
        return
    cuts = [cut for step in steps for cut in step.operation.cuts]
    try:
        small = _plain(copy.deepcopy(subject.model))
    except SurgeryError as error:
        yield Finding("shrunk_equals_masked", "model", statement=statement, skipped=error.diagnostics[0].message)
        return
    if any(True for _ in rewritten(small)):
        reason = "other statements act on the model, and cannot all be folded into it"
        yield Finding("shrunk_equals_masked", "model", statement=statement, skipped=reason)
        return
    whole = replace(subject, model=small)
    found, norms, told = whole.output(), narrow_norms(small, cuts), ""
    try:
        widen(small, cuts)
        with looking_at(small, norms):
            difference = relative_error(found, whole.output())
        if norms:
            away = relative_error(found, whole.output())
            told = (
                f"{len(norms)} norms take their mean of what is left; beside a mean of all the output is {away:.2g} off"
            )
    except (RuntimeError, SurgeryError):  # the widths that it states do not go together
        difference = float("inf")
    depth = max(1, len({place for cut in cuts for place in cut.group.places}))
    bound = merge_bound(subject.dtype, depth)
    count = sum(cut.group.count - len(cut.kept) for cut in cuts)
    note = f"{count} units at zero"
    places = max(1, len(cuts))
    yield Finding("shrunk_equals_masked", "model", difference, bound, statement, note, sites=places, told=told)


def _plain(model: nn.Module) -> nn.Module:
    """The model with what else was done to it folded in."""
    from surgery.compiler import merge

    with torch.no_grad():
        return merge(model) if record_of(model) is not None and any(True for _ in rewritten(model)) else model


def _unchecked(subject: Subject) -> str:
    if not subject.runs:
        return "no inputs to run it on (pass example_inputs=...)"
    if any(step.operation.phase != "shrink" for step in subject.plan.reshaping):
        return "its layers were changed after its widths"
    if sum(tensor.numel() * tensor.element_size() for tensor in subject.model.parameters()) > LIMIT:
        return f"it is larger than {LIMIT >> 30} GB"
    return ""
