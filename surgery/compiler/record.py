"""What a transformed model knows about itself, and the switch between it and its base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from surgery.compiler.plan import Plan
from surgery.errors import GraphError
from surgery.graph.fingerprint import fingerprints
from surgery.graph.module import added_parameters, rewritten, switched

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
    """Names of the tensors that no statement acts on; one on an attention call leaves its tensors alone."""
    selected = {part.path for step in plan.steps for part in step.parts if part.kind != "attention"}
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


def names(model: nn.Module) -> set[str]:
    """Names of everything that can be switched: `default` where a statement has no `as NAME`."""
    return {name for _, module in rewritten(model) for name in module.branches()}


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Run the base, to the bit: pruned and quantized as the program says, without anything attached to it."""
    with switched(model, {None}):
        yield


def activate(model: nn.Module, *wanted: str) -> None:
    """Keep only these adapters on, by their names; `default` is what has no `as NAME`. None given: all on.

    Error: GraphError S310 for a name that the model does not have.
    """
    known = names(model)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise GraphError.of(
            "S310", f"no adapter `{unknown[0]}` in this model", help=f"it has: {', '.join(sorted(known)) or 'none'}"
        )
    for _, module in rewritten(model):
        module.switch(known - set(wanted) if wanted else frozenset())
