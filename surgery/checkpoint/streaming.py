"""`surgery apply` on a directory, place by place: read, transform, write, forget. Memory follows the largest place."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.checkpoint import huggingface
from surgery.checkpoint.base import may_refer, reference
from surgery.checkpoint.content import content
from surgery.checkpoint.header import Header, check_checkpoint, read_header
from surgery.checkpoint.inventory import inventory
from surgery.checkpoint.layout import write_index
from surgery.checkpoint.places import Places
from surgery.checkpoint.save import write_config, write_manifest, write_tokenizer
from surgery.checkpoint.sink import Sink
from surgery.checkpoint.source import Source
from surgery.checkpoint.staging import resumed
from surgery.checkpoint.tensors import DTYPES, Tell, silent
from surgery.checkpoint.work import Make, left_alone, return_pages, work_through
from surgery.compiler import required
from surgery.compiler.apply import perform
from surgery.compiler.record import parameters
from surgery.compiler.stream import Place, Stream, whole_model
from surgery.graph import zeros
from surgery.graph.blank import empty_out

if TYPE_CHECKING:
    from torch import Tensor, nn

    from surgery.anatomy.parts import Part
    from surgery.checkpoint.models import LoadedModel
    from surgery.compiler import Plan


def whole_because(plan: Plan, loaded: LoadedModel) -> str | None:
    """Why a plan needs all of a model in memory; None where its directory can be streamed. loaded: on meta.

    The one place where that is decided.
    """
    if "_surgery" in loaded.model.__dict__:
        return "the model was transformed before"
    if loaded.directory is None:
        return "the model is made by code"
    return whole_model(plan) or unlike(loaded.model, check_checkpoint(loaded.directory))


def unlike(model: nn.Module, headers: Sequence[Header]) -> str | None:
    """How a model's tensors differ from those in its files, where they do: names, shapes, dtypes, several of a tie."""
    found = {info.name: info for header in headers for info in header.tensors}
    names: dict[int, list[str]] = {}
    tensors = dict(model.state_dict(keep_vars=True))
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    for several in names.values():
        held = [found[name] for name in several if name in found]
        tensor = tensors[several[0]]
        if len(held) != 1:
            return f"{several[0]} lies in its files {'twice' if held else 'under another name'}"
        if held[0].shape != tuple(tensor.shape) or DTYPES.get(held[0].dtype) != tensor.dtype:
            return f"{several[0]} has another shape or dtype in its files"
    if huggingface.converts(model):
        return "its library stores tensors in another form than it computes with"
    return None


@left_alone()
def stream(
    plan: Plan,
    directory: Path,
    output: Path,
    *,
    origin: str,
    tokenizer: Any = None,
    force: bool,
    standalone: bool = False,
    jobs: int = 1,
    tell: Tell = silent,
) -> None:
    """Carry out a plan on a Hugging Face directory, for which `whole_because` has no reason, into a new directory.

    standalone: as of `save`. jobs: processes that share the work. The same bytes as `apply` and `save` give; what is
    there appears whole or not at all, and a run that was killed is gone on with. Errors: those of `apply` and `save`;
    S434 and S435 as `staging.resumed` says.
    """
    refers = not standalone and may_refer(plan, directory, output)
    work = Applying(plan, directory, tokenizer, refers)
    make = partial(Applying, plan, directory, refers=refers)
    write(work, make, output, origin=origin, force=force, jobs=jobs, tell=tell)


def write(
    work: Applying, make: Make, output: Path, *, origin: str, force: bool, jobs: int = 1, tell: Tell = silent
) -> Sink:
    """As `stream`, whatever the work is; gives what was written. make: the same work, for another process."""
    with (
        work.source,
        resumed(output, work.fingerprint(), work.found.size, force) as (aside, journal),
        Sink(aside, work.found.files, tell=tell) as sink,
    ):
        return_pages()
        if len(journal.units) < work.units:
            work.streams.prepare(lambda name: work.source.read(work.origins[name]))
        alone = any(step.operation.collective for step in work.plan.steps)  # what is prepared is prepared here
        work_through(work, sink, journal, 1 if alone else jobs, make)
        sink.finish()
        write_index(aside, work.found.weights)
        write_config(work.hollow, aside, work.found)
        write_tokenizer(work.hollow, aside, origin, None)
        base = reference(work.directory, output) if work.found.elsewhere else None
        write_manifest(work.hollow, aside, work.found, sink.digests, origin, work.started(sink), base)
        if required.undecided(work.plan):
            with Source(read_header(aside / file.name) for file in work.found.files) as written:
                _check(work.plan, Places(work.hollow, written, work.found.key))
    return sink


def _check(plan: Plan, result: Places) -> None:
    """What the program requires of its result, where only the numbers show it. Errors: PromiseError S502."""

    def count(part: Part) -> tuple[int, int]:
        with result.at(part.path):
            return zeros.count(result.model, part)

    required.check_places(plan, result.model, count)


class Applying:
    """What is to be done, in units that depend on nothing but themselves. hollow: the result without numbers.

    refers: the result has no copy of the base.
    """

    def __init__(self, plan: Plan, directory: Path, tokenizer: Any = None, refers: bool = False) -> None:
        self.plan, self.directory = plan, directory
        self.hollow = perform(plan, huggingface.skeleton(directory, meta=True), hollow=True)
        self.model = huggingface.skeleton(directory, meta=False)
        empty_out(self.model)
        self.source = Source(check_checkpoint(directory))
        self.streams = Stream(plan, self.model, tokenizer)
        # By every name that the model has for a tensor, the one that its files have.
        self.origins = {
            name: origin
            for one in inventory(self.model).values()
            for origin in one.names
            if origin in self.source
            for name in one.names
        }
        kept = (one for one in inventory(self.hollow).values() if refers and one.persistent and not one.added)
        self.found = content(self.hollow, directory, {one.name: self.origins[one.name] for one in kept})
        at_places = {name for place in self.streams.places for name in place.reads}
        order = {path: index for index, (path, _) in enumerate(self.model.named_modules(remove_duplicate=False))}
        copies: dict[str, list[str]] = {}
        self.constants: list[str] = []
        for name in self.found.held:
            if name in self.streams.base and name not in at_places:
                if name in self.origins:
                    copies.setdefault(name.rpartition(".")[0], []).append(name)
                else:
                    self.constants.append(name)
        todo: list[tuple[int, Place | list[str]]] = [
            *((order[place.key[0]], place) for place in self.streams.places),
            *((order[path], names) for path, names in copies.items()),
        ]
        self._todo = [one for _, one in sorted(todo, key=lambda pair: pair[0])]
        self.units, self.files = len(self._todo) + 1, self.found.files

    def fingerprint(self) -> dict[str, object]:
        """What the result depends on."""
        program: list[object] = [str(self.plan.program), self.plan.program.seed]
        how = {"way to keep the base": "by reference" if self.found.elsewhere else "as a copy"}
        return {"program": program, **how, **self.source.fingerprint()}

    def started(self, sink: Sink) -> list[str]:
        """Trained tensors that are as a program starts them."""
        trained = parameters(self.hollow)
        return [name for name, _ in self.hollow.named_parameters() if name in trained]

    def at(self, place: Place, sink: Sink) -> dict[str, Tensor]:
        """What is at a place afterwards, by full name."""
        return self.streams.at(place, {name: self.source.read(self.origins[name]) for name in place.reads})

    def copy(self, name: str, sink: Sink) -> None:
        """Write a tensor that stays as it is, or what is to be known of it."""
        write = sink.note_copy if name in self.found.elsewhere else sink.copy
        write(self.found.key(name), self.source, self.origins[name])

    def do(self, unit: int, sink: Sink) -> list[str]:
        """Carry out one unit; the last one writes what no weight decides."""
        if unit == len(self._todo):
            values = self.found.constants()
            for name in self.constants:
                values |= self.found.values(name, self.model.get_buffer(name))
            return sink.write(values)
        todo = self._todo[unit]
        if isinstance(todo, Place):
            wrote: list[str] = []
            for name, tensor in self.at(todo, sink).items():
                if name in self.found.elsewhere:
                    sink.note(name, tensor)
                    wrote.append(name)
                elif name in self.found.held:
                    wrote += sink.write(self.found.values(name, tensor))
            return wrote
        for name in todo:
            self.copy(name, sink)
        return [self.found.key(name) for name in todo]
