"""A result that refers to its base as one that has a copy of it: tensor by tensor, each held to its digest."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from surgery.checkpoint.base import find, headers, same_names
from surgery.checkpoint.header import INDEX
from surgery.checkpoint.inventory import inventory
from surgery.checkpoint.layout import FileLayout, Slot, shard_size, shards, write_index
from surgery.checkpoint.load import load_either
from surgery.checkpoint.manifest import NAME, WEIGHTS, WITH_BASE, Manifest
from surgery.checkpoint.sink import Sink
from surgery.checkpoint.source import Source
from surgery.checkpoint.staging import resumed
from surgery.checkpoint.tensors import Tell, silent
from surgery.checkpoint.work import work_through
from surgery.errors import CheckpointError


def stream_standalone(
    directory: Path, output: Path, *, force: bool, base: str | Path | None = None, tell: Tell = silent
) -> None:
    """Write what `surgery apply --standalone` would have written, as it has been trained since, to a new directory.

    The base's tensors lie as `save` lays them out; the other files of `directory` come along as they are, hidden ones
    aside. Of a result that has all of its tensors itself that is a copy. No model is loaded.
    base: as of `load`. tell: called with the number of bytes read since its last call.
    Errors: those of `load`; S430 to S435 as `staging.resumed` says, S431 also inside of `directory`.
    """
    manifest = Manifest.read(directory)
    if directory.resolve() in output.expanduser().resolve().parents:
        raise CheckpointError.of(
            "S431",
            f"`{output}` is inside `{directory}`, and what is in that comes along",
            help="choose a place beside it, or the same one with --force",
        )
    work = Completing(directory, manifest, base)
    fingerprint = {"program": ["standalone", str(directory.resolve())], **work.source.fingerprint()}
    size = sum(file.size for file in work.files) + sum((directory / path).stat().st_size for path in work.beside)
    with (
        work.source,
        resumed(output, fingerprint, size, force) as (partial, journal),
        Sink(partial, work.files, tell=tell) as sink,
    ):
        work_through(work, sink, journal)
        sink.finish()
        for path in work.beside:
            (partial / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(directory / path, partial / path)
        if manifest.base is not None:
            write_index(partial, work.files)
            copied = {name: replace(manifest.tensors[name], file=file, key=None) for name, file in sink.home.items()}
            replace(manifest, tensors={**manifest.tensors, **copied}, base=None).write(partial / NAME)


class Completing:
    """What is to be done, a tensor at a time: those of the base are copied, and those that come along are checked.

    files: of the base's tensors. beside: files that come along, by their paths in the directory.
    """

    def __init__(self, directory: Path, manifest: Manifest, base: str | Path | None) -> None:
        self.manifest, place = manifest, find(directory, manifest, base)
        self.beside = _beside(directory, refers=place is not None)
        self.names = list(manifest.tensors)
        held = {}
        if place is not None:
            # Shards are in the model's order, which the manifest does not tell.
            held = inventory(load_either(str(directory), meta=True).model)
            same_names(set(held), set(manifest.tensors), "the directory")
            self.names = list(held)
        self.source = Source(header for _, header in headers(directory, manifest, place))
        slots = [
            Slot(name, self.source.infos[self._key(name)].dtype, tuple(one.tensor.shape), name.rpartition(".")[0])
            for name, one in held.items()
            if manifest.tensors[name].file == WITH_BASE
        ]
        self.files: tuple[FileLayout, ...] = shards(slots, shard_size(place)) if place is not None else ()
        self.units = len(self.names)

    def do(self, unit: int, sink: Sink) -> list[str]:
        """Carry out one unit. Errors: as of `Manifest.check`."""
        name, held = self.names[unit], self.manifest.digest()
        take = sink.copy if self.manifest.tensors[name].file == WITH_BASE else sink.note_copy
        take(name, self.source, self._key(name), held)
        self.manifest.check(name, held)
        return [name]

    def _key(self, name: str) -> str:
        """The name of a tensor in its file."""
        return self.manifest.tensors[name].key or name


def _beside(directory: Path, refers: bool) -> list[Path]:
    """Paths in a directory of files that come along: all that are not hidden, but for what is written anew."""
    found = (path.relative_to(directory) for path in sorted(directory.rglob("*")) if path.is_file())
    seen = [path for path in found if not any(part.startswith(".") for part in path.parts)]
    return [path for path in seen if not (refers and (str(path) in (NAME, INDEX) or WEIGHTS.fullmatch(str(path))))]
