"""Two directories compared tensor by tensor, a stretch of bytes at a time: memory does not grow with the tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from surgery.checkpoint.base import find, headers
from surgery.checkpoint.header import WIDTHS, TensorInfo, check_checkpoint, read_header
from surgery.checkpoint.manifest import ADDED, NAME, WITH_BASE, Manifest
from surgery.checkpoint.tensors import DTYPES, Tell, silent
from surgery.graph.digest import bytes_of as bytes_in

STRETCH = 2**22  # elements read at a time


@dataclass(frozen=True)
class Difference:
    """What became of one tensor.

    before, after: dtype and shape, `BF16 576 x 192`; None where one side lacks it.
    changed: share of entries that differ. error: |after - before| / |before| in Frobenius norms. largest: of the
    entries' absolute differences. zeros: share of entries that are zero, before and after. All are None where shapes
    differ, or one side lacks it; the last three where entries are no numbers (packed codes).
    """

    name: str
    before: str | None
    after: str | None
    changed: float | None = None
    error: float | None = None
    largest: float | None = None
    zeros: tuple[float, float] | None = None

    @property
    def same(self) -> bool:
        """Same dtype, same shape, same bits."""
        return self.before is not None and self.before == self.after and self.changed == 0

    def to_json(self) -> dict[str, Any]:
        """Plain data, without what is not known."""
        return {key: value for key, value in vars(self).items() if value is not None}


class Stored(NamedTuple):
    """Where a tensor lies. manifest: of one that lies with a base, what holds it to its digest, by its `name` there."""

    path: Path
    info: TensorInfo
    manifest: Manifest | None = None
    name: str = ""


def tensors_of(directory: Path, base: str | Path | None = None) -> dict[str, Stored]:
    """Every tensor of a directory's weights, of a base that it refers to, and those that a program added.

    base: where that lies by now. Errors: those of `check_checkpoint`, `base.find` and `base.headers`.
    """
    manifest = Manifest.read(directory) if (directory / NAME).exists() else None
    if manifest is not None and manifest.base is not None:
        names = {entry.key or name: name for name, entry in manifest.tensors.items() if entry.file == WITH_BASE}
        return {
            info.name: Stored(header.path, info, *((manifest, names[info.name]) if file == WITH_BASE else ()))
            for file, header in headers(directory, manifest, find(directory, manifest, base))
            for info in header.tensors
        }
    found = list(check_checkpoint(directory))
    if (directory / ADDED).exists():
        found.append(read_header(directory / ADDED))
    return {info.name: Stored(header.path, info) for header in found for info in header.tensors}


def compare(before: Path, after: Path, tell: Tell = silent, *, base: str | Path | None = None) -> Iterator[Difference]:
    """Every tensor of either directory, by name. tell: is told the bytes of `before` and `after` as they are read.

    base: where the base lies by now that one of them refers to.
    """
    old, new = tensors_of(before, base), tensors_of(after, base)
    for name in sorted({*old, *new}):
        yield _difference(name, old.get(name), new.get(name), tell)


def bytes_of(directory: Path, base: str | Path | None = None) -> int:
    """How many bytes `compare` reads there, for a progress bar."""
    return sum(one.info.stop - one.info.start for one in tensors_of(directory, base).values())


def _difference(name: str, old: Stored | None, new: Stored | None, tell: Tell) -> Difference:
    before, after = (None if side is None else describe(side.info) for side in (old, new))
    if old is None or new is None or old.info.shape != new.info.shape:
        tell(sum(side.info.stop - side.info.start for side in (old, new) if side is not None))
        return Difference(name, before, after)
    count = math.prod(old.info.shape)
    digests = [None if side.manifest is None else side.manifest.digest() for side in (old, new)]
    sums: dict[str, float] = dict.fromkeys(("changed", "norm", "error", "largest", "zero_before", "zero_after"), 0.0)
    numbers = True
    with old.path.open("rb") as one, new.path.open("rb") as other:
        for start in range(0, count, STRETCH):
            length = min(STRETCH, count - start)
            a, b = _read(one, old.info, start, length), _read(other, new.info, start, length)
            for held, read in zip(digests, (a, b), strict=True):
                if held is not None:
                    held.update(bytes_in(read))
            tell(a.numel() * a.element_size() + b.numel() * b.element_size())
            numbers = numbers and a.dtype.is_floating_point and b.dtype.is_floating_point
            _add(sums, a, b, same_bits=old.info.dtype == new.info.dtype)
    for side, held in zip((old, new), digests, strict=True):
        if side.manifest is not None and held is not None:
            side.manifest.check(side.name, held)
    count = max(count, 1)
    if not numbers:
        return Difference(name, before, after, sums["changed"] / count)
    error = math.sqrt(sums["error"] / sums["norm"]) if sums["norm"] else (math.inf if sums["error"] else 0.0)
    zeros = (sums["zero_before"] / count, sums["zero_after"] / count)
    return Difference(name, before, after, sums["changed"] / count, error, sums["largest"], zeros)


def _add(sums: dict[str, float], a: Tensor, b: Tensor, same_bits: bool) -> None:
    """Entries are compared by their bits where they have the same dtype: what is no number equals itself."""
    if same_bits:
        whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        sums["changed"] += int((a.view(whole) != b.view(whole)).sum())
    wide_a, wide_b = a.double(), b.double()
    if not same_bits:
        sums["changed"] += int((wide_a != wide_b).sum())
    apart = wide_b - wide_a
    sums["norm"] += float(wide_a.square().sum())
    sums["error"] += float(apart.square().sum())
    sums["largest"] = max(sums["largest"], float(apart.abs().max()))
    sums["zero_before"] += int((wide_a == 0).sum())
    sums["zero_after"] += int((wide_b == 0).sum())


def _read(file: BinaryIO, info: TensorInfo, start: int, length: int) -> Tensor:
    """Elements of one tensor; of a dtype that torch has no arithmetic for, its bytes."""
    dtype = DTYPES.get(info.dtype, torch.uint8)
    if dtype.is_complex:
        dtype = torch.float32
    width = WIDTHS[info.dtype]
    first, last = start * width // 8, -(-(start + length) * width // 8)
    file.seek(info.start + first)
    data = bytearray(file.read(last - first))
    return torch.frombuffer(data, dtype=dtype)


def describe(info: TensorInfo) -> str:
    """`BF16 576 x 192`."""
    return " ".join((info.dtype, " x ".join(map(str, info.shape)))).strip()


def summary(differences: list[Difference]) -> Mapping[str, int]:
    """How many tensors are the same, changed, gone and new."""
    counts = dict.fromkeys(("same", "changed", "gone", "new"), 0)
    for each in differences:
        kind = "new" if each.before is None else "gone" if each.after is None else "same" if each.same else "changed"
        counts[kind] += 1
    return counts
