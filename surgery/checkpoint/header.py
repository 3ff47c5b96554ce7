"""Read and check safetensors headers before anything is loaded: cheap, strict, and never a pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.errors import CheckpointError

# Bits per element, by the names the format uses.
WIDTHS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
LONGEST_HEADER = 16_000_000  # bytes
TENSORS = 130_000  # in one file, at most
# How often the signs of JSON may occur, in names and metadata as well: a value takes far more memory than its text.
SIGNS: Mapping[bytes, int] = {b"{": TENSORS, b"[": 2 * TENSORS, b":": 5 * TENSORS, b",": 8 * TENSORS}
LARGEST = 2**62  # of what is counted: sizes, offsets, elements
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: dtype as the format spells it (`BF16`), shape, first byte and the one after the last."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself."""

    path: Path
    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """The header of one file, every claim checked against the file's size.

    Errors: S410 missing, S411 truncated, S412 corrupt, S413 a pickle in disguise.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would wait for somebody to write into it
            raise _error("S410", path, "is no file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix, first = file.read(8), file.read(1)
            # A length may look like a pickle's first bytes (640 does); what follows it never does.
            if first != b"{" and prefix[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
                raise _pickle(path)
            if size < 8:
                raise _error("S411", path, f"is truncated: {size} bytes", "download or copy the file again")
            length = int.from_bytes(prefix, "little")
            if length > LONGEST_HEADER:
                raise _corrupt(path, f"its header claims {length} bytes")
            if length > size - 8:
                raise _error("S411", path, "is truncated inside its header", "download or copy the file again")
            text = (first + file.read(length - 1)) if length else b""
    except OSError as error:
        raise _unreadable(path, error) from None
    if _has_too_many_values(text):
        raise _corrupt(path, f"its header has more values than {TENSORS:,} tensors would take")
    try:
        data = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, f"its header is not JSON ({error})") from None
    if not isinstance(data, dict):
        raise _corrupt(path, "its header is not a JSON object")
    metadata = data.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _corrupt(path, "its metadata is not a map of strings")
    tensors = sorted((_tensor(path, name, entry, 8 + length) for name, entry in data.items()), key=lambda t: t.start)
    _check_layout(path, tensors, 8 + length, size)
    return Header(path, tuple(tensors), metadata)


def checkpoint_files(directory: Path) -> tuple[Path, ...]:
    """The safetensors files that hold a directory's weights: `model.safetensors`, or the shards of its index.

    Errors: S410 none, S413 only pickles, S414 an index that points outside the directory or is not one.
    """
    single, index = directory / "model.safetensors", directory / INDEX
    if single.exists() or single.is_symlink():
        return (_inside(directory, single.name, single),)
    if index.exists() or index.is_symlink():
        _within(directory, index.name, index)
        return tuple(_inside(directory, name, index) for name in sorted(set(read_index(index).values())))
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise _pickle(directory / pickles[0])
    raise CheckpointError.of(
        "S410",
        f"no weights in `{directory}`: neither model.safetensors nor {INDEX}",
        help="`surgery plan` and `surgery anatomy` need only config.json; `apply` needs the weights",
    )


def read_index(index: Path) -> dict[str, str]:
    """The `weight_map` of a shard index: tensor name to file name. Errors: S410, S414."""
    try:
        if not index.is_file():
            raise _error("S410", index, "is no file")
        if index.stat().st_size > LONGEST_HEADER:
            raise CheckpointError.of("S414", f"the shard index `{index}` has more than {LONGEST_HEADER:,} bytes")
        text = index.read_bytes()
        if _has_too_many_values(text):
            raise CheckpointError.of("S414", f"the shard index `{index}` has more values than an index would have")
        data = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise _unreadable(index, error) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError.of("S414", f"the shard index `{index}` is not JSON ({error})") from None
    names = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError.of("S414", f"the shard index `{index}` has no weight_map of names to files")
    return names


def check_checkpoint(directory: Path) -> tuple[Header, ...]:
    """Headers of all weight files of a directory, checked; with an index, that each tensor is where it says.

    Reads a few kilobytes per file whatever the size of the model.
    """
    headers = tuple(read_header(path) for path in checkpoint_files(directory))
    index = directory / INDEX
    if not (directory / "model.safetensors").exists() and index.exists():
        held = {header.path.name: {tensor.name for tensor in header.tensors} for header in headers}
        for tensor, file in read_index(index).items():
            if tensor not in held[Path(file).name]:
                raise CheckpointError.of("S414", f"the shard index `{index}` says `{file}` holds {tensor}; it does not")
        seen: set[str] = set()
        for file, names in held.items():
            if seen & names:
                raise CheckpointError.of(
                    "S414", f"`{directory / file}` holds {min(seen & names)}, as another shard does"
                )
            seen |= names
    return headers


def _inside(directory: Path, name: str, source: Path) -> Path:
    """`directory / name` when it stays inside; symbolic links may go to the blobs of the same Hugging Face cache."""
    path = Path(name)
    if path.is_absolute() or len(path.parts) != 1 or "\\" in name or path.suffix != ".safetensors":
        if path.suffix in PICKLES:
            raise _pickle(directory / name)
        raise _outside(source, name)
    return _within(directory, name, source)


def _within(directory: Path, name: str, source: Path) -> Path:
    """`directory / name` when its links stay inside."""
    refused = _outside(source, name)
    root = directory.resolve()
    try:
        target = (directory / name).resolve()
    except (ValueError, RuntimeError, OSError):  # no name for a file, or links in a circle
        raise refused from None
    roots = [root]
    if root.parent.name == "snapshots":
        roots.append(root.parent.parent / "blobs")
    if not any(target.is_relative_to(allowed) for allowed in roots):
        raise refused
    return directory / name


def _outside(source: Path, name: str) -> CheckpointError:
    return CheckpointError.of(
        "S414",
        f"`{source}` points outside its directory: `{name}`",
        help="put the shards beside their index",
    )


def _has_too_many_values(text: bytes) -> bool:
    """Whether JSON would take much memory, found without reading it."""
    return any(text.count(sign) > most for sign, most in SIGNS.items())


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"`{key}` occurs twice")
        found[key] = value
    return found


def _tensor(path: Path, name: str, entry: Any, base: int) -> TensorInfo:
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise _corrupt(path, f"tensor {name} is not described") from None
    numbers = [start, stop, *shape] if isinstance(shape, list) else [None]
    known = isinstance(dtype, str) and dtype in WIDTHS
    if not known or any(not isinstance(n, int) or isinstance(n, bool) or not 0 <= n <= LARGEST for n in numbers):
        raise _corrupt(path, f"tensor {name} has an unknown dtype, shape or offset")
    count = 1
    for size in shape:
        count = min(count * size, LARGEST)  # or multiplying many large ones would take forever
    if stop - start != (count * WIDTHS[dtype] + 7) // 8:
        raise _corrupt(path, f"tensor {name} is {dtype} of shape {shape}, but has {stop - start} bytes")
    return TensorInfo(name, dtype, tuple(shape), base + start, base + stop)


def _check_layout(path: Path, tensors: list[TensorInfo], begin: int, size: int) -> None:
    """Tensors follow each other without overlap or hole and end where the file ends."""
    place = begin
    for tensor in tensors:
        if tensor.start != place:
            fault = "overlaps the one before" if tensor.start < place else "leaves a hole before it"
            raise _corrupt(path, f"tensor {tensor.name} {fault}")
        place = tensor.stop
    if place > size:
        raise _error("S411", path, f"is truncated: {size} bytes of {place}", "download or copy the file again")
    if place < size:
        raise _corrupt(path, f"{size - place} bytes follow the last tensor")


def _error(code: str, path: Path, what: str, help: str = "") -> CheckpointError:
    return CheckpointError.of(code, f"`{path}` {what}", help=help)


def _corrupt(path: Path, why: str) -> CheckpointError:
    return _error("S412", path, f"is not a valid safetensors file: {why}", "download or copy the file again")


def _pickle(path: Path) -> CheckpointError:
    return _error(
        "S413",
        path,
        "is a pickle, which can run any code when opened; only safetensors is read",
        "convert it where you trust it: `model.save_pretrained(directory)` writes safetensors",
    )


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return _error("S410", path, f"cannot be read: {error.strerror or error}")
