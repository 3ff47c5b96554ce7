"""What a directory of tensors is, without reading the weights: headers, the manifest, and the masks' bits."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from surgery.anatomy.parts import Part
from surgery.checkpoint.base import digest_of, find, headers
from surgery.checkpoint.compare import Stored, tensors_of
from surgery.checkpoint.header import WIDTHS, TensorInfo, read_header
from surgery.checkpoint.manifest import ADDED, NAME, WITH_BASE, Manifest
from surgery.compiler.zeros import Cell
from surgery.errors import CheckpointError
from surgery.graph.site import tensor_name

MASK = "_mask"


def inspect(directory: Path, base: str | Path | None = None) -> dict[str, Any]:
    """model, files (name, bytes, tensors, elements by dtype); of an output also version, program, steps, promises.

    Where it refers to a base, also that: path, tensors, digest, and whether it is there. base: where, by now.
    Errors: CheckpointError S410 to S414 for the files, S440 and S441 for the manifest.
    """
    manifest = Manifest.read(directory) if (directory / NAME).exists() else None
    if manifest is None or manifest.base is None:
        tensors = tensors_of(directory)
    else:
        added = read_header(directory / ADDED)
        tensors = {info.name: Stored(added.path, info) for info in added.tensors}
    config = _config(directory)
    found: dict[str, Any] = {
        "model": ", ".join(config.get("architectures") or ())
        or config.get("model_type")
        or "tensors without config.json",
        "files": _files(tensors),
    }
    if isinstance(quantization := config.get("quantization_config"), Mapping):
        words = ("quant_method", "bnb_4bit_quant_type")
        found["quantization"] = " ".join(str(quantization[word]) for word in words if quantization.get(word))
    if manifest is not None:
        try:
            steps, promises = [_step(step, tensors) for step in manifest.plan["steps"]], _promises(manifest.promises)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError.of("S440", f"`{directory / NAME}` is not a manifest of ours ({error})") from None
        found.update(
            model=manifest.model_class.rpartition(":")[2],
            version=manifest.version,
            origin=manifest.origin,
            program=manifest.program,
            steps=steps,
            promises=promises,
        )
        if manifest.base is not None:
            found["base"] = _base(directory, manifest, base)
    return found


def _base(directory: Path, manifest: Manifest, given: str | Path | None) -> dict[str, Any]:
    """What is referred to. missing: why it cannot be read, where it cannot."""
    count = sum(entry.file == WITH_BASE for entry in manifest.tensors.values())
    told: dict[str, Any] = {**vars(manifest.base), "tensors": count, "digest": digest_of(manifest)}
    try:
        place = find(directory, manifest, given)
        headers(directory, manifest, place)
    except CheckpointError as error:
        return {**told, "missing": error.diagnostics[0].message}
    return {**told, "path": str(place)}


def _files(tensors: Mapping[str, Stored]) -> list[dict[str, Any]]:
    files: dict[Path, list[TensorInfo]] = {}
    for path, info, *_ in tensors.values():
        files.setdefault(path, []).append(info)
    return [
        {
            "name": path.name,
            "bytes": path.stat().st_size,
            "tensors": len(infos),
            "elements": dict(sum((Counter({info.dtype: _count(info)}) for info in infos), Counter())),
        }
        for path, infos in sorted(files.items())
    ]


def _count(info: TensorInfo) -> int:
    return (info.stop - info.start) * 8 // WIDTHS[info.dtype]


def _step(step: Mapping[str, Any], tensors: Mapping[str, Stored]) -> dict[str, Any]:
    """A statement, how many places it acts on, what it added, and where it masks, the share of zeros it makes."""
    told = {
        "statement": step["statement"],
        "places": len(step["parts"]),
        "parameters": step["parameters_added"],
    }
    zeros = weights = 0
    cells: list[dict[str, Any]] = []
    if step["phase"] == "mask":
        for part in map(Part.from_json, step["parts"]):
            held = tensors.get(f"{part.path}.{tensor_name(f'{part.parameter}{MASK}', part, None)}")
            if held is not None:
                cell = Cell.of(part, part.shape[0] * part.shape[1] - _ones(held.path, held.info))
                zeros, weights = zeros + (cell.zeros or 0), weights + cell.size
                cells.append(asdict(cell))
    if weights:
        told["by_layer"] = cells
        told["zeros"] = zeros / weights
    return told


def _ones(path: Path, info: TensorInfo) -> int:
    """Number of bits that are set."""
    with path.open("rb") as file:
        file.seek(info.start)
        data = torch.frombuffer(bytearray(file.read(info.stop - info.start)), dtype=torch.uint8)
    return int(torch.tensor([bin(byte).count("1") for byte in range(256)])[data.int()].sum())


def _promises(report: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if report is None:
        return None
    findings = report["findings"]
    broken = [f"{each['promise']} at {each['place']}" for each in findings if each["status"] == "fails"]
    checked = dict.fromkeys(each["promise"] for each in findings if each["status"] != "skipped")
    skipped = dict.fromkeys(each["promise"] for each in findings if each["promise"] not in checked)
    return {"names": list(checked), "broken": broken, "unchecked": list(skipped)}


def _config(directory: Path) -> Mapping[str, Any]:
    try:
        config = json.loads((directory / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
