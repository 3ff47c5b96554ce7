"""What a transformed model knows about itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from surgery.compiler.plan import Plan
from surgery.graph.fingerprint import fingerprints
from surgery.graph.module import added_parameters

ATTRIBUTE = "_surgery"


@dataclass(frozen=True)
class Record:
    """The plan that was applied, and fingerprints by which to tell later what was written to.

    untouched: of the tensors that no statement selected, before anything was done. start: of all tensors when it was
    done. Of a model that was loaded, both are from after that, and `start` leaves out what is trained.
    """

    plan: Plan
    untouched: Mapping[str, str]
    start: Mapping[str, str]


def unselected(plan: Plan, model: nn.Module) -> list[str]:
    """Names of the tensors that no statement acts on; one on an attention call or an edge leaves its tensors alone."""
    selected = {part.path for step in plan.steps for part in step.parts if not part.apart}
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    added = added_parameters(model)
    return [name for name in names if name.rpartition(".")[0] not in selected and name not in added]


def remembered(plan: Plan, model: nn.Module) -> Record:
    """The record of a model whose tensors are as a plan says already."""
    now = fingerprints(model)
    trained = added_parameters(model)
    frozen = {name: print_ for name, print_ in now.items() if name not in trained}
    return Record(plan, {name: now[name] for name in unselected(plan, model)}, frozen)


def record_of(model: nn.Module) -> Record | None:
    """The record of a transformed model, None of any other."""
    record: Record | None = model.__dict__.get(ATTRIBUTE)
    return record


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """The trainable tensors that the program added, by full name; each shared one once."""
    return added_parameters(model)
