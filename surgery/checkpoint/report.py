"""What can be told of a saved result with its weights, read a place at a time: zeros, magnitudes, cuts, sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from surgery.checkpoint.header import check_checkpoint
from surgery.checkpoint.inspect import inspect
from surgery.checkpoint.manifest import Manifest
from surgery.checkpoint.models import directory_of
from surgery.checkpoint.places import places
from surgery.checkpoint.source import Source
from surgery.compiler import Plan
from surgery.compiler.zeros import Cell
from surgery.errors import CheckpointError
from surgery.graph import zeros

if TYPE_CHECKING:
    from torch import Tensor

    from surgery.anatomy.parts import Part

LOW, HIGH = -24, 6
"""Magnitudes from 2**LOW to 2**HIGH are told apart, in half octaves; what lies outside is in the bins at the ends."""
BINS = 2 * (HIGH - LOW)


@dataclass
class Magnitudes:
    """Of the weights of a role, how many have a size, by bins. cut: of `gone`, which are zero, the sizes they had."""

    kept: list[int] = field(default_factory=lambda: [0] * BINS)
    cut: list[int] = field(default_factory=lambda: [0] * BINS)
    gone: int = 0


@dataclass(frozen=True)
class Units:
    """Neurons or heads that a statement left at a place, of as many as there were."""

    statement: str
    place: str
    kept: int
    count: int


@dataclass(frozen=True)
class Facts:
    """about: as of `inspect`. totals: of the plan. cells: of all projections of the stacks.

    depths: (stack, layers before, layers after). magnitudes: by role, of weights with zeros. compared: whether the base
    was there, layer by layer, to tell what had been cut.
    """

    about: Mapping[str, Any]
    totals: Mapping[str, Any]
    cells: tuple[Cell, ...]
    magnitudes: Mapping[str, Magnitudes]
    compared: bool
    units: tuple[Units, ...]
    depths: tuple[tuple[str, int, int], ...]


def facts(directory: Path, base: str | Path | None = None) -> Facts:
    """Reads every weight once, and the base's where it is still there. Errors: those of `inspect` and `load`.

    base: where it lies by now, of a result that refers to it.
    """
    about = inspect(directory, base)
    cells: list[Cell] = []
    magnitudes: dict[str, Magnitudes] = {}
    compared = False
    manifest = Manifest.read(directory)
    result = places(directory, manifest, base)
    with result.source, _base(manifest.origin) as before:
        plan = Plan.from_json(manifest.plan)
        if any(step.operation.phase == "depth" for step in plan.steps):
            before = None  # its layers have other numbers
        for path, parts in _by_path(plan).items():
            with result.at(path):
                for part in parts:
                    weight = zeros.weight_of(result.model, part)
                    gone = weight == 0
                    cell = Cell.of(part, int(gone.sum()))
                    cells.append(cell)
                    if cell.zeros:
                        found = magnitudes.setdefault(part.role, Magnitudes())
                        found.gone += cell.zeros
                        _count(found.kept, weight[~gone])
                        earlier = _before(before, part)
                        if earlier is not None and earlier.shape == weight.shape:
                            compared = True
                            _count(found.cut, earlier[gone])
    given = plan.anatomy if plan.given is None else plan.given
    depths = {stack.path: stack.depth for stack in given.stacks}
    changed = [(s.name, depths.get(s.path, s.depth), s.depth) for s in plan.anatomy.stacks]
    told = tuple(each for each in changed if each[1] != each[2])
    return Facts(about, plan.cost.totals_json(), tuple(cells), magnitudes, compared, tuple(_units(plan)), told)


@contextmanager
def _base(origin: str | None) -> Iterator[Source | None]:
    """The files that the result was made from; None where they are not there any more, or it was made by code."""
    try:
        headers = check_checkpoint(directory_of(origin)) if origin and ":" not in origin else ()
    except CheckpointError:
        headers = ()
    if not headers:
        yield None
        return
    with Source(headers) as source:
        yield source


def _by_path(plan: Plan) -> dict[str, list[Part]]:
    """Projections that stand in a layer, by their module; tied ones are told of once."""
    found: dict[str, list[Part]] = {}
    for part in plan.anatomy.parts:
        if part.kind == "projection" and part.layer is not None and len(part.shape) == 2:
            found.setdefault(part.path, []).append(part)
    return found


def _before(base: Source | None, part: Part) -> Tensor | None:
    """The rows of a part in the base, where they have the same name and shape there."""
    name = f"{part.path}.{part.parameter}"
    if base is None or name not in base:
        return None
    stored = tuple(reversed(part.shape)) if part.transposed else part.shape
    return zeros.rows(part, base.read(name)) if base.infos[name].shape == stored else None


def _count(bins: list[int], numbers: Tensor) -> None:
    """Add how many numbers lie in each half octave; zeros have no size."""
    sizes = numbers[numbers != 0].float().abs().log2().mul(2).floor().sub(2 * LOW).clamp(0, BINS - 1)
    for index, count in enumerate(torch.bincount(sizes.long(), minlength=BINS).tolist()):
        bins[index] += count


def _units(plan: Plan) -> Iterator[Units]:
    for step in plan.reshaping:
        for cut in getattr(step.operation, "cuts", ()):
            for place in cut.group.places:
                yield Units(str(step.statement), place, len(cut.kept), cut.group.count)
