"""Exact sparsity: as many zeros as were asked for, where the mask says, whatever the weight is stored as."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from surgery.anatomy.parts import Part
from surgery.compiler.plan import Step
from surgery.graph.draft import Draft
from surgery.graph.functions import unpack_bits
from surgery.graph.module import Rewritten
from surgery.graph.site import Site
from surgery.operations.subnetwork import STEP
from surgery.training.masks import weights_of
from surgery.verify.report import Finding
from surgery.verify.subject import Subject


def exact_sparsity(subject: Subject) -> Iterator[Finding]:
    """Every place of every statement that promises it: counts are compared with what was asked, and must be equal.

    Such an operation keeps a bit mask `weight_mask` beside each weight, and has an `amount`, a share of the weights or
    a Ratio of neighbours that stay. With `global_` the count is that of all its places together, with `by_row` that of
    each row. Or it says by `zeros_of` how many each place has; or by `settled` what it is once a step has been made.
    """
    for step in subject.steps:
        if "exact_sparsity" not in step.operation.promises():
            continue
        operation = _operation(subject.model, step)
        counts = [_count(subject.model, operation, step, part) for part in step.parts]
        if getattr(operation, "global_", False):
            total = sum(size for _, _, _, size in counts)
            cut = sum(cut for cut, *_ in counts)
            asked = round(operation.amount * total)
            yield Finding("exact_sparsity", "all together", abs(cut - asked), 0.0, str(step.statement), "masked")
        for part, (cut, wrong, excess, size) in zip(step.parts, counts, strict=True):
            note = f"{cut:,} of {size:,} weights are zero"
            error = wrong + (0 if getattr(operation, "global_", False) else excess)
            yield Finding("exact_sparsity", part.path, error, 0.0, str(step.statement), note)


def _operation(model: nn.Module, step: Step) -> Any:
    """The statement as it is at the step at which its masks changed last."""
    operation: Any = step.operation
    if STEP not in operation.moving:
        return operation
    steps = {each.step for each in weights_of(step, model, 0)}
    return operation.settled(max(steps))


def _count(model: nn.Module, operation: Any, step: Step, part: Part) -> tuple[int, int, int, int]:
    """Masked weights, masked ones that are not zero, distance of the count from what was asked, and all weights."""
    module = model.get_submodule(part.path)
    weight, mask = _weight_and_mask(module, step, part)
    cut = int((~mask).sum())
    wrong = int((weight[~mask] != 0).sum())
    if hasattr(operation, "zeros_of"):
        excess = abs(cut - operation.zeros_of(part))
    elif getattr(operation, "by_row", False):
        excess = int(((~mask).sum(1) - round(operation.amount * mask.shape[1])).abs().sum())
    elif isinstance(operation.amount, float | int):
        excess = abs(cut - round(operation.amount * mask.numel()))
    else:
        groups = mask.reshape(len(mask), -1, operation.amount.whole).sum(-1)
        excess = int((groups != operation.amount.part).sum())
    return cut, wrong, excess, mask.numel()


def _weight_and_mask(module: nn.Module, step: Step, part: Part) -> tuple[Tensor, Tensor]:
    """The part's rows, (out, in), of the weight as it is used and of the mask."""
    if not isinstance(module, Rewritten):  # merged since: zeros speak for themselves
        stored = getattr(module, part.parameter)
        if stored is None:
            missing = torch.ones(part.shape)
            return missing, missing == 0
        stored = stored.detach()
        weight = stored.t() if part.transposed else stored
        return weight, weight != 0
    draft = Draft(module, part.path, part.parameter)
    site = Site(draft, part, str(step.statement), step.statement.name, step.operation.verb)
    held, transposed = draft.root._parameters.get(part.parameter), draft.facts.transposed
    # As it lies there, where it is no code: evaluating the graph would multiply the mask in.
    if held is None or not held.is_floating_point():
        weight = site.evaluate(site.weight)
    else:
        weight = held.detach().t() if transposed else held.detach()
    bits = site.data("weight_mask")
    mask = unpack_bits(bits, weight.t().shape if transposed else weight.shape)
    mask = mask.t() if transposed else mask
    return site.rows_of(weight), site.rows_of(mask).to(torch.bool)
