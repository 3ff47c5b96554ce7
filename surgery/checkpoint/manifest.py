"""surgery.json: what was done to which model, and every tensor's place, shape and digest."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import CheckpointError
from surgery.graph.digest import Digest, digest

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 3
BLAKE2 = 2  # the last format with such digests
NAME = "surgery.json"
BASE, ADDED = "model.safetensors", "surgery.safetensors"
WEIGHTS = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors")  # BASE, or the shards of its index
KINDS: Mapping[str, Any] = {
    "format": int, "version": str, "program": str, "seed": int, "plan": dict, "model_class": str, "origin": str | None,
    "ties": dict, "shape": str, "settings": dict, "promises": dict | None,
}  # fmt: skip
WITH_BASE = "base"  # what stands for the file of a tensor that lies where the base lies


@dataclass(frozen=True)
class Entry:
    """One tensor: its file, digest (BLAKE3, 128 bits, of the bytes in the file) and key there.

    file: WITH_BASE where it lies in some file of the base. key: its name in the file where that differs from its name
    in the model. dtype, shape: as the file says them; up to format 2 they were not written down.
    """

    file: str
    digest: str
    key: str | None = None
    dtype: str | None = None
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Base:
    """Where the base of a result lies that has no copy of it: `demo`, or an absolute path and one from the result."""

    path: str
    relative: str | None = None


@dataclass(frozen=True)
class Manifest:
    """The contents of surgery.json.

    program: canonical text. plan: the resolved sites, as `Plan.to_json`. model_class: `module:QualName`.
    origin: MODEL that the base came from, None where only its class is known.
    base: where the tensors of it lie that this directory has no copy of; None where it has them all.
    shape: `config` where config.json says the model's widths and layers, `replay` where the plan changes them again.
    settings: what config.json leaves out (attention implementation). ties: name -> name of the tensor it is.
    trainable: parameters that require gradients, or will once their adapter is on. inactive: adapters that were off.
    untrained: those of the trainable ones that were still as they started, which a later program may start anew.
    extras: keys in the files that only other readers want.
    promises: as `Report.to_json` of the last `verify`.
    """

    version: str
    program: str
    seed: int
    plan: Mapping[str, Any]
    model_class: str
    origin: str | None
    tensors: Mapping[str, Entry]
    ties: Mapping[str, str] = field(default_factory=dict)
    trainable: tuple[str, ...] = ()
    untrained: tuple[str, ...] = ()
    inactive: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()
    shape: str = "config"
    settings: Mapping[str, Any] = field(default_factory=dict)
    promises: Mapping[str, Any] | None = None
    base: Base | None = None
    format: int = FORMAT

    def write(self, path: Path) -> None:
        """To a file, which is not synced here."""
        data = asdict(self)
        data["tensors"] = {
            name: {key: value for key, value in asdict(entry).items() if value is not None}
            for name, entry in sorted(self.tensors.items())
        }
        data = {"format": data.pop("format"), **data}
        path.write_text(_by_lines(data) + "\n", "utf-8")

    def digest(self) -> Digest:
        """An empty one, of the kind that this manifest has."""
        return Digest(former=self.format <= BLAKE2)

    def check(self, name: str, found: Tensor | Digest) -> None:
        """Errors: for a tensor with another digest than the one that was written, S412, or S448 one of the base."""
        entry = self.tensors[name]
        text = found.text if isinstance(found, Digest) else digest(found, former=self.format <= BLAKE2)
        if text != entry.digest:
            raise _changed(name, entry, "digest", text[:8], entry.digest[:8])

    def check_form(self, name: str, dtype: str, shape: Sequence[int]) -> None:
        """As `check`, of the dtype and shape that a file says of a tensor: the same bytes may be other numbers."""
        entry = self.tensors[name]
        if entry.dtype not in (None, dtype):
            raise _changed(name, entry, "dtype", dtype, entry.dtype)
        if entry.shape not in (None, tuple(shape)):
            raise _changed(name, entry, "shape", tuple(shape), entry.shape)

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Errors: S401 no such directory, S440 no such file or not ours, S441 written by a newer version."""
        if not directory.is_dir():
            raise CheckpointError.of("S401", f"no directory `{directory}`", help="give an output of `surgery apply`")
        path = directory / NAME
        try:
            data = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise CheckpointError.of(
                "S440", f"`{directory}` is not the output of `surgery apply`: it has no {NAME}"
            ) from None
        except OSError as error:
            raise CheckpointError.of("S440", f"`{path}` cannot be read: {error.strerror or error}") from None
        except (ValueError, RecursionError) as error:
            raise CheckpointError.of("S440", f"`{path}` is not JSON ({error})") from None
        if isinstance(data, dict) and isinstance(data.get("format"), int) and data["format"] > FORMAT:
            raise CheckpointError.of(
                "S441",
                f"`{path}` has format {data['format']}; this version reads up to {FORMAT}",
                help="pip install -U model-surgery",
            )
        try:
            data["tensors"] = {str(name): _entry(value) for name, value in data["tensors"].items()}
            data["trainable"], data["extras"] = tuple(data["trainable"]), tuple(data.get("extras", ()))
            data["untrained"] = tuple(data.get("untrained", ()))
            data["inactive"] = tuple(map(str, data.get("inactive", ())))
            data["base"] = Base(**data["base"]) if data.get("base") else None
            manifest = cls(**data)
            if wrong := [name for name, kind in KINDS.items() if not isinstance(getattr(manifest, name), kind)]:
                raise TypeError(wrong[0])
            if manifest.plan.get("program", manifest.program) != manifest.program:
                raise ValueError("the plan is of another program")
            if manifest.base is None and any(entry.file == WITH_BASE for entry in manifest.tensors.values()):
                raise ValueError("no base")
            if manifest.base and not all(isinstance(path, str | None) for path in vars(manifest.base).values()):
                raise TypeError("base")
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise CheckpointError.of("S440", f"`{path}` is not a manifest of ours ({error})") from None
        return manifest


def _changed(name: str, entry: Entry, what: str, now: object, before: object) -> CheckpointError:
    if entry.file == WITH_BASE:
        return CheckpointError.of(
            "S448",
            f"the base has changed: {name} has {what} {now}, and had {before} when this was saved",
            help="say where the one lies that it was: `--base DIR`, or surgery.load(path, base=DIR)",
        )
    return CheckpointError.of(
        "S412", f"{name} is not what was saved: its {what} differs", help="copy the directory again"
    )


def keep_promises(directory: Path, promises: Mapping[str, Any]) -> None:
    """Write what a verification found into the manifest of a directory; one that is read-only stays as it is."""
    partial = directory / f".{NAME}.partial"
    try:
        replace(Manifest.read(directory), promises=promises).write(partial)
        partial.replace(directory / NAME)
    except OSError:
        partial.unlink(missing_ok=True)


def _by_lines(data: Any, depth: int = 3) -> str:
    """JSON with one line for each item down to a depth, so that people can read it and diffs are small."""
    dumped = json.dumps(data, ensure_ascii=False)
    if depth == 0 or not isinstance(data, dict | list) or len(dumped) < 100:
        return dumped
    if isinstance(data, dict):
        items = [f"{json.dumps(key)}: {_by_lines(value, depth - 1)}" for key, value in data.items()]
        opening, closing = "{", "}"
    else:
        items = [_by_lines(value, depth - 1) for value in data]
        opening, closing = "[", "]"
    return opening + "\n" + ",\n".join(items) + "\n" + closing


def _entry(data: Mapping[str, Any]) -> Entry:
    entry = Entry(**data)
    if entry.file not in (ADDED, WITH_BASE) and not WEIGHTS.fullmatch(entry.file):
        raise ValueError(f"file {entry.file}")
    if not isinstance(entry.digest, str) or not all(isinstance(one, str | None) for one in (entry.key, entry.dtype)):
        raise TypeError(f"a tensor of {entry.file}")
    return entry if entry.shape is None else replace(entry, shape=tuple(entry.shape))
