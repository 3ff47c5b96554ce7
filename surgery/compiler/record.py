"""What a transformed model knows about itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from surgery.compiler.plan import Plan
from surgery.compiler.training import trained
from surgery.graph.fingerprint import fingerprints
from surgery.graph.module import added_parameters, rewritten

ATTRIBUTE = "_surgery"


@dataclass(frozen=True)
class Record:
    """The plan that was applied, and fingerprints by which to tell later what was written to.

    untouched: of the tensors that no statement selected, before anything was done. start: of all tensors when it was
    done. Of a model that was loaded, both are from after that, and `start` leaves out what is trained.
    shape: how a loader comes by the model's shape: its configuration says it, or the plan's reshaping is replayed on a
    model of the configuration before, `config`.
    """

    plan: Plan
    untouched: Mapping[str, str]
    start: Mapping[str, str]
    shape: str = "config"
    config: Any = None


def continued(record: Record | None, done: Record, kept: Collection[str]) -> Record:
    """What is known after another program. kept: names of what has been trained since the first."""
    if record is None:
        return done
    untouched = {name: record.untouched.get(name, print_) for name, print_ in done.untouched.items()}
    start = {name: print_ for name, print_ in done.start.items() if name not in kept}
    start.update({name: record.start[name] for name in kept if name in record.start})
    return Record(done.plan, untouched, start, record.shape, record.config)


def unselected(plan: Plan, model: nn.Module) -> list[str]:
    """Names of the tensors that no statement acts on; one on an attention call, say, leaves its tensors alone."""
    selected = {
        part.path for step in plan.steps for part in step.parts if not part.apart and step.operation.rewrites(part)
    }
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    moved = {*_added(model), *trained(plan, model)}
    return [name for name in names if name.rpartition(".")[0] not in selected and name not in moved]


def _added(model: nn.Module) -> set[str]:
    """Names of all tensors at places of programs that the base does not have."""
    held = {(path, name) for path, module in rewritten(model) for name in (*module._parameters, *module._buffers)}
    base = {
        (path, name)
        for path, module in rewritten(model)
        for name in (*module.original._parameters, *module.original._buffers)
    }
    return {f"{path}.{name}" if path else name for path, name in held - base} | set(added_parameters(model))


def untrained(record: Record, model: nn.Module) -> list[str]:
    """Names of what is trained and still is as it started."""
    prints = fingerprints(model, parameters(model))
    return [name for name, print_ in prints.items() if record.start.get(name) == print_]


def trained_since(record: Record, model: nn.Module) -> dict[str, Tensor]:
    """What is trained and no longer as it started, as far as is known, by full name."""
    same = set(untrained(record, model))
    return {name: tensor for name, tensor in parameters(model).items() if name not in same}


def remembered(plan: Plan, model: nn.Module, untrained: Collection[str] = ()) -> Record:
    """The record of a model whose tensors are as a plan says already. untrained: names that are as they started."""
    now = fingerprints(model)
    moved = {*added_parameters(model), *trained(plan, model)} - set(untrained)
    frozen = {name: print_ for name, print_ in now.items() if name not in moved}
    held = record_of(model)
    untouched = {name: now[name] for name in unselected(plan, model)}
    return (
        Record(plan, untouched, frozen) if held is None else replace(held, plan=plan, untouched=untouched, start=frozen)
    )


def record_of(model: nn.Module) -> Record | None:
    """The record of a transformed model, None of any other."""
    record: Record | None = getattr(model, "__dict__", {}).get(ATTRIBUTE)
    return record


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that the program trains, by full name; each shared one once: first what it added, then the base's."""
    record = record_of(model)
    base = {} if record is None else trained(record.plan, model)
    return {**added_parameters(model), **base}
