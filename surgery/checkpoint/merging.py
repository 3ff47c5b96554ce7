"""`surgery merge` on a directory, place by place: read what stands there, fold it, write plain weights, forget."""

from __future__ import annotations

import functools
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.checkpoint import huggingface
from surgery.checkpoint.base import weights_directory
from surgery.checkpoint.content import content, plain
from surgery.checkpoint.layout import write_index
from surgery.checkpoint.load import load_either
from surgery.checkpoint.manifest import Manifest
from surgery.checkpoint.places import places
from surgery.checkpoint.save import copy_tokenizer, write_config, write_manifest, write_tokenizer
from surgery.checkpoint.sink import Sink
from surgery.checkpoint.staging import resumed
from surgery.checkpoint.tensors import Tell, silent
from surgery.checkpoint.work import left_alone, work_through
from surgery.compiler import Plan, merge, record_of
from surgery.compiler.merge import named
from surgery.compiler.some import fold_some
from surgery.graph import scratch
from surgery.graph.blank import blank, lent
from surgery.graph.module import Rewritten, rewritten, standings
from surgery.graph.rounding import Rounding, one_thread

if TYPE_CHECKING:
    from torch import Tensor, nn

    from surgery.checkpoint.content import Content


def merged_shapes(directory: Path, requantize: bool = False) -> nn.Module | None:
    """What a merge of a directory gives, without numbers; None where it takes all of the model to know, or to do.

    The one place where that is decided: places of which each becomes a plain map of its own, or codes again, can be
    folded one by one. requantize and errors: of `merge`.
    """
    manifest = Manifest.read(directory)
    if manifest.inactive or manifest.model_class.split(".")[0] != "transformers":
        return None
    model = load_either(str(directory), meta=True).model
    tied = {*manifest.ties, *manifest.ties.values()}
    for path, site in rewritten(model):
        if site.facts is None or not site.facts.plain or tied & {f"{path}.{name}" for name in site._parameters}:
            return None
    merged = merge(model, requantize=requantize)
    record = record_of(merged)
    left = () if record is None else record.plan.steps
    if any(step.operation.phase != "quantize" for step in left) or huggingface.converts(merged):
        return None
    return merged


@left_alone()
def stream_merge(
    directory: Path,
    shapes: nn.Module,
    output: Path,
    *,
    force: bool,
    base: str | Path | None = None,
    jobs: int = 1,
    tell: Tell = silent,
) -> dict[str, Rounding]:
    """Merge what `surgery apply` wrote to a directory into a new one. shapes: of `merged_shapes`.

    base: as of `load`. jobs: processes that share the work. The same bytes as `merge` and `save_merged` give; what
    comes back is what rounding did to every tensor that changes, as `merge` reports it. Errors: those of `load`; S430
    to S435 as `staging.resumed` says.
    """
    work = Merging(directory, shapes, base)
    program = ["merge", str(directory.resolve()), *(["requantize"] if work.coded else [])]
    fingerprint = {"program": program, **work.source.fingerprint()}
    with (
        work.source,
        resumed(output, fingerprint, work.found.size, force) as (partial, journal),
        Sink(partial, work.found.files, wanted=work.coded, tell=tell) as sink,
        one_thread(),
    ):
        work_through(work, sink, journal, jobs, functools.partial(Merging, directory, base=base, coded=work.coded))
        sink.finish()
        write_index(partial, work.found.weights)
        write_config(shapes, partial, work.found)
        if work.coded:
            write_tokenizer(shapes, partial, work.manifest.origin, None)
            write_manifest(shapes, partial, work.found, sink.digests, work.manifest.origin, ())
        else:
            copy_tokenizer(directory, partial)
    return {name: Rounding(**sink.notes[name]) for name in sorted(sink.notes)}


class Merging:
    """What is to be done, in units that depend on nothing but themselves. coded: codes are codes again."""

    def __init__(
        self,
        directory: Path,
        shapes: nn.Module | None = None,
        base: str | Path | None = None,
        coded: bool = False,
    ) -> None:
        shapes = merged_shapes(directory, coded) if shapes is None else shapes
        assert shapes is not None
        self.coded = record_of(shapes) is not None
        self.manifest = manifest = Manifest.read(directory)
        written = places(directory, manifest, base)
        self.model, self.source = written.model, written.source
        self.plan, self.slots = Plan.from_json(manifest.plan), standings(self.model)
        shards_of = weights_directory(self.model, manifest.origin)
        self.found: Content = content(shapes, shards_of) if self.coded else plain(shapes, shards_of)
        self.sites: dict[str, Rewritten] = dict(rewritten(self.model))
        copies: dict[str, list[str]] = {}
        for name in self.found.held:
            path = name.rpartition(".")[0]
            if path not in self.sites:
                copies.setdefault(path, []).append(name)
        order = {path: index for index, (path, _) in enumerate(self.model.named_modules(remove_duplicate=False))}
        self._todo: list[str | list[str]] = sorted(
            (*self.sites, *copies.values()),
            key=lambda one: order[one if isinstance(one, str) else one[0].rpartition(".")[0]],
        )
        self.units, self.files = len(self._todo) + 1, self.found.files

    def do(self, unit: int, sink: Sink) -> list[str]:
        """Carry out one unit; the last one writes what no weight decides."""
        if unit == len(self._todo):
            return sink.write(self.found.constants())
        todo = self._todo[unit]
        if isinstance(todo, str):
            with scratch.reused():
                made, roundings = self._folded(todo)
                sink.notes.update((name, asdict(one)) for name, one in roundings.items())
                wrote = [self.found.values(name, tensor) for name, tensor in made.items() if name in self.found.held]
                return [key for values in wrote for key in sink.write(values)]
        for name in todo:
            held = self.manifest.digest()
            sink.copy(name, self.source, self._key(name), held)
            self.manifest.check(name, held)
        return todo

    def _folded(self, path: str) -> tuple[dict[str, Tensor], dict[str, Rounding]]:
        """The tensors of the module that a place becomes, plain or with codes, and what rounding did to them."""
        site = self.sites[path]
        held = [f"{path}.{name}" for store in (site.named_parameters(), site.named_buffers()) for name, _ in store]
        read = {name: self.source.read(self._key(name)) for name in held if name in self.manifest.tensors}
        for name, tensor in read.items():
            self.manifest.check(name, tensor)
        with lent(self.model, read):
            told: dict[str, Rounding] = {}
            slots = self.slots[id(site)]
            module = fold_some(path, site, frozenset(site.branches()), self.plan, slots, told, requantize=self.coded)
            tensors = {**module._parameters, **module._buffers}
            made = {f"{path}.{name}": tensor.detach() for name, tensor in tensors.items() if tensor is not None}
        for parameter in module._parameters.values():
            if parameter is not None:
                parameter.data = blank(parameter)
        return made, named(path, told)

    def _key(self, name: str) -> str:
        return self.manifest.tensors[name].key or name
