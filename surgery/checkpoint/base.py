"""The base of a result that refers to it: found again by path, and known by the digest of every tensor."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from surgery.checkpoint.header import Header, check_checkpoint, checkpoint_files, read_header
from surgery.checkpoint.inventory import inventory
from surgery.checkpoint.manifest import NAME, WITH_BASE, Base, Manifest
from surgery.checkpoint.models import demo_directory, directory_of
from surgery.checkpoint.source import Source
from surgery.checkpoint.tensors import slot_of
from surgery.errors import CheckpointError
from surgery.graph.digest import bytes_of, digest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from surgery.compiler import Plan

FOUND = "_surgery_base"  # attribute of a loaded model: the directory that its base was read from


def base_directory(model: nn.Module, origin: str | None) -> Path | None:
    """The directory that the base was read from, while it is still there."""
    for spec in (origin, getattr(model, "name_or_path", None)):
        if spec == "demo":
            return demo_directory()
        if spec and Path(spec).is_dir():
            return Path(spec)
    return None


def weights_directory(model: nn.Module, origin: str | None) -> Path | None:
    """As `base_directory`, where the base's weights were read from, which may lie apart from a result's files."""
    return model.__dict__.get(FOUND) or base_directory(model, origin)


def referred(model: nn.Module, plan: Plan, origin: str | None, target: Path) -> tuple[Base, dict[str, str]] | None:
    """What a result says of its base, and the base's tensors by name with their names in its files; None: copy them.

    The very bits that the model has must lie there. target: where the result will be.
    """
    directory = weights_directory(model, origin)
    if directory is None or not may_refer(plan, directory, target):
        return None
    keys: dict[str, str] = {}
    try:
        with Source(check_checkpoint(directory)) as source:
            for name, one in inventory(model).items():
                if one.persistent and not one.added:
                    key = next((other for other in one.names if other in source), None)
                    if key is None or not _same(source, key, one.tensor):
                        return None
                    keys[name] = key
    except (CheckpointError, OSError):  # pickles, say
        return None
    return reference(directory, target), keys


def may_refer(plan: Plan, directory: Path, target: Path) -> bool:
    """Whether a result may refer to its base: no statement changes it, and it is likely to stay where it is.

    It is not where it is a result itself, where the new one replaces it, or in a directory for temporary files that
    the new one does not lie in.
    """
    if any(step.operation.changes_base or step.operation.reshapes() for step in plan.steps):
        return False
    place, out, temporary = (path.expanduser().resolve() for path in (directory, target, Path(tempfile.gettempdir())))
    passing = place.is_relative_to(temporary) and not out.is_relative_to(temporary)
    return not (passing or place.is_relative_to(out) or (place / NAME).exists())


def reference(directory: Path, target: Path) -> Base:
    """How a result at `target` says where its base lies."""
    place = directory.expanduser().resolve()
    with suppress(CheckpointError):
        if place == demo_directory().resolve():
            return Base("demo")
    with suppress(ValueError):  # on another drive
        return Base(str(place), os.path.relpath(place, target.expanduser().resolve()))
    return Base(str(place))


def find(directory: Path, manifest: Manifest, given: str | Path | None = None) -> Path | None:
    """Where the base of the result in a directory lies; None where the result has its tensors itself.

    given: where it is known to lie, as MODEL. Errors: S447 it is not there, S401 and S402 what is given is not.
    """
    said = manifest.base
    if said is None:
        return None
    if given is not None or said.path == "demo":
        return directory_of(str(given or said.path))
    places = [Path(said.path), *([directory.resolve() / said.relative] if said.relative else [])]
    for place in places:
        with suppress(CheckpointError, OSError):  # no permission, say
            if place.is_dir() and checkpoint_files(place):
                return place
    raise CheckpointError.of(
        "S447",
        f"the base of `{directory}` is no longer in `{said.path}`",
        help="say where it is: `--base DIR`, or surgery.load(path, base=DIR)",
    )


def headers(directory: Path, manifest: Manifest, base: Path | None) -> list[tuple[str, Header]]:
    """Of every file that a result's tensors lie in, holding just those, with what the manifest calls the file.

    base: of `find`. Errors: S410 to S414 the files, S442 tensors are missing or too many, S448 of the base; those of
    `Manifest.check_form`.
    """
    wanted: dict[str, dict[str, str]] = {}  # by file, the name in the model of every name there
    for name, entry in manifest.tensors.items():
        wanted.setdefault(entry.file, {})[entry.key or name] = name
    with_base = wanted.pop(WITH_BASE, {})
    found = []
    for file, names in sorted(wanted.items()):
        header = read_header(directory / file)
        same_names(set(names), {tensor.name for tensor in header.tensors} - set(manifest.extras), f"`{header.path}`")
        found.append((file, header))
    if base is not None:
        left = set(with_base)
        for header in check_checkpoint(base):
            infos = tuple(info for info in header.tensors if info.name in with_base)
            left -= {info.name for info in infos}
            found += [(WITH_BASE, replace(header, tensors=infos))] if infos else []
        if left:
            raise CheckpointError.of(
                "S448",
                f"`{base}` is not the base of `{directory}`: it has no {min(left)}",
                help="say where that is: `--base DIR`, or surgery.load(path, base=DIR)",
            )
        wanted[WITH_BASE] = with_base
    for file, header in found:
        for info in header.tensors:
            if info.name in wanted[file]:
                manifest.check_form(wanted[file][info.name], info.dtype, info.shape)
    return found


def total_bytes(directory: Path, given: str | Path | None = None) -> int:
    """How many bytes of tensors `load` will read, near enough for a progress bar. given: as of `find`."""
    base = find(directory, Manifest.read(directory), given)
    files = [*directory.glob("*.safetensors"), *(checkpoint_files(base) if base is not None else ())]
    return sum(path.stat().st_size for path in files)


def same_names(wanted: set[str], held: set[str], where: str) -> None:
    """Errors: S442 where they differ."""
    for names, what in ((wanted - held, "lacks"), (held - wanted, "has unexpected")):
        if names:
            some = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise CheckpointError.of("S442", f"{where} {what} {len(names)} of the manifest's tensors: {some}")


def digest_of(manifest: Manifest) -> str:
    """One digest of all that a result has from its base: of the names there and of each one's digest."""
    lines = {
        f"{entry.key or name} {entry.digest}\n" for name, entry in manifest.tensors.items() if entry.file == WITH_BASE
    }
    return digest("".join(sorted(lines)).encode())


def _same(source: Source, key: str, tensor: Tensor) -> bool:
    """Whether a tensor has the dtype, shape and bits of one in a file."""
    info, slot = source.infos[key], slot_of(key, tensor)
    if (info.dtype, info.shape) != (slot.dtype, slot.shape):
        return False
    data, flat = bytes_of(tensor), torch.uint8
    return all(
        torch.equal(torch.frombuffer(part, dtype=flat), torch.frombuffer(data[at : at + len(part)], dtype=flat))
        for at, part in source.stretches(key)
    )
