"""`surgery extract` on two directories, tensor by tensor: what a tuned model has become, as an adapter on its base."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.checkpoint import huggingface
from surgery.checkpoint.base import may_refer
from surgery.checkpoint.header import check_checkpoint
from surgery.checkpoint.inventory import inventory
from surgery.checkpoint.source import Source
from surgery.checkpoint.streaming import Applying, unlike, whole_because, write
from surgery.checkpoint.tensors import Tell, silent
from surgery.compiler.extract import (
    Extracted,
    Extraction,
    check_alike,
    differs,
    factors,
    keep_started,
    parts_of,
    tensors,
    weight_of,
)
from surgery.compiler.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

    from surgery.checkpoint.models import LoadedModel
    from surgery.checkpoint.sink import Sink
    from surgery.compiler.stream import Place


def whole_of_either(plan: Plan, base: LoadedModel, tuned: LoadedModel) -> str | None:
    """Why both models have to be in memory; None where their directories can be streamed. Both: on meta."""
    if tuned.directory is None:
        return "the tuned model is made by code"
    return whole_because(plan, base) or unlike(tuned.model, check_checkpoint(tuned.directory))


def stream_extract(
    plan: Plan,
    base: Path,
    tuned: Path,
    output: Path,
    *,
    origin: str,
    force: bool,
    standalone: bool = False,
    jobs: int = 1,
    tell: Tell = silent,
) -> Extraction:
    """As `surgery.extract` and `surgery.save`, where `whole_of_either` has no reason. plan: of `extract.statement`.

    standalone: as of `save`. jobs: processes that share the work. Errors: those of both; S434 and S435 as
    `staging.resumed` says.
    """
    refers = not standalone and may_refer(plan, base, output)
    work = Extracting(plan, base, tuned, refers)
    with work.tuned:
        make = partial(Extracting, plan, base, tuned, refers)
        sink = write(work, make, output, origin=origin, force=force, jobs=jobs, tell=tell)
    said = [each for notes in sink.notes.values() for each in notes.get("places", ())]
    found = {key: Extracted(**{**values, "size": tuple(values["size"])}) for key, values in said}
    others = {name for notes in sink.notes.values() for name in notes.get("others", ())}
    order = [_key(weight_of(part), part.role) for step in plan.steps for part in step.parts]
    return Extraction(
        tuple(found[key] for key in order), tuple(name for name in tensors(work.hollow) if name in others)
    )


class Extracting(Applying):
    """As `Applying`, with what every new adapter holds taken from the difference to another directory."""

    def __init__(self, plan: Plan, directory: Path, tuned: Path, refers: bool = False) -> None:
        super().__init__(plan, directory, refers=refers)
        other = huggingface.skeleton(tuned, meta=True)
        self.covered = parts_of(plan)
        self.tuned = Source(check_checkpoint(tuned))
        check_alike(tensors(self.model), tensors(other))
        self.theirs = {
            name: origin
            for one in inventory(other).values()
            for origin in one.names
            if origin in self.tuned
            for name in one.names
        }
        self.aliases = {one.name: one.names for one in inventory(self.model).values()}

    def fingerprint(self) -> dict[str, object]:
        return {**super().fingerprint(), "tuned model": self.tuned.fingerprint()["source"]}

    def started(self, sink: Sink) -> list[str]:
        same = {name for notes in sink.notes.values() for name in notes.get("same", ())}
        return [name for name in super().started(sink) if name in same]

    def at(self, place: Place, sink: Sink) -> dict[str, Tensor]:
        made = super().at(place, sink)
        for step, part in place.visits:
            name = weight_of(part)
            before, after = self._both(name)
            values, found = factors(step, part, before, after)
            full = {
                next(key for key in made if key.rpartition(".")[2] == local): value for local, value in values.items()
            }
            for key, value in full.items():
                keep_started(made[key], value)
            notes = sink.notes.setdefault(min(full), {"places": [], "same": []})
            notes["places"].append((_key(name, part.role), asdict(found)))
            notes["same"] += [] if found.effect else list(full)
        return made

    def copy(self, name: str, sink: Sink) -> None:
        super().copy(name, sink)
        others = []
        for alias in self.aliases[name]:
            parts = [part for _, part in self.covered.get(alias, ())]
            if alias in self.theirs and not any(part.channels is None for part in parts):
                before, after = self._both(alias)
                others += [alias] if differs(parts, before, after) else []
        if others:
            sink.notes[self.found.key(name)] = {"others": others}

    def _both(self, name: str) -> tuple[Tensor, Tensor]:
        return self.source.read(self.origins[name]), self.tuned.read(self.theirs[name])


def _key(name: str, role: str) -> str:
    return f"{name} {role}"
