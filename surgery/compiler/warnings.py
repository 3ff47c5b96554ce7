"""What a plan's reader should know before applying it, though nothing is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from surgery.compiler.conflicts import overlap
from surgery.errors import standing_at

if TYPE_CHECKING:
    from torch import nn

    from surgery.anatomy.parts import Anatomy
    from surgery.compiler.plan import Step


def warnings(steps: Sequence[Step], anatomy: Anatomy, model: nn.Module) -> tuple[str, ...]:
    """One sentence each, in the order of the steps."""
    found = [*_dense_again(steps), *_untied(steps), *_without_experts(steps, anatomy), *_kept(steps)]
    for step in steps:
        with standing_at(step.statement.span):
            found += step.operation.warnings(step.parts, anatomy, model)
    return tuple(dict.fromkeys(found))


def _kept(steps: Sequence[Step]) -> list[str]:
    """Keys and values that are computed once do not see what is trained later."""
    trained = [s for s in steps if s.operation.phase in ("attach", "train") and not hasattr(s.operation, "stored")]
    return [
        f"`{step.statement}` keeps keys and values as they are at the start: they do not follow what "
        f"`{trained[0].statement}` learns; leave `cached` out to have them follow"
        for step in steps
        if getattr(step.operation, "stored", False) and trained
    ]


def _dense_again(steps: Sequence[Step]) -> list[str]:
    """A branch that is merged into a masked matrix fills its zeros."""
    found = []
    for mask in (step for step in steps if "exact_sparsity" in step.operation.promises()):
        for branch in (
            step
            for step in steps
            if step.operation.phase == "attach"
            and "merges" in step.operation.promises()
            and not step.operation.keeps_zeros
        ):
            places = [a for a in branch.parts for b in mask.parts if a.path == b.path and overlap(a, b)]
            if places:
                found.append(
                    f"merging `{branch.statement}` into what `{mask.statement}` prunes makes {len(places)} "
                    f"{'matrices' if len(places) > 1 else 'matrix'} dense again"
                )
    return found


def _without_experts(steps: Sequence[Step], anatomy: Anatomy) -> list[str]:
    """Experts are stacked in tensors of three dimensions, which methods for matrices pass by."""
    experts = [part for part in anatomy.parts if part.kind == "experts"]
    return [
        f"`{step.statement}` leaves the stacked weights of the experts as they are ({experts[0].path} and the like)"
        for step in steps
        if experts and "projection" in step.operation.acts_on and "experts" not in step.operation.acts_on
    ]


def _untied(steps: Sequence[Step]) -> list[str]:
    """A branch on one of several users of a tensor is merged into a copy."""
    return [
        f"merging `{step.statement}` unties {part.path} from {', '.join(part.tied)}"
        for step in steps
        if step.operation.phase == "attach"
        for part in step.parts
        if part.tied and part.kind in ("projection", "lookup")
    ]
