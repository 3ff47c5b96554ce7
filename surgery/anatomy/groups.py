"""Coupled groups: the rows and columns of a model's tensors that stand or go together. Plain data; knows no torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from typing import Any, Literal

from surgery.anatomy.paths import moved

Kind = Literal["neurons", "heads", "channels"]
TABLES = ("readers", "writers", "shared")


@dataclass(frozen=True)
class Run:
    """Indices `start` and on: `each` neighbours for the unit `unit`, as many for the next one, for `count` units."""

    start: int
    unit: int
    count: int
    each: int


@dataclass(frozen=True)
class Axis:
    """One axis of a stored tensor, `parameter` of the module at `path`, of `size` indices: which unit each belongs to.

    Indices outside of all runs belong to none and stay.
    """

    path: str
    parameter: str
    axis: int
    size: int
    runs: tuple[Run, ...]

    @classmethod
    def of(cls, path: str, parameter: str, axis: int, units: Sequence[int]) -> Axis:
        """units: of each index, -1 for none."""
        return cls(path, parameter, axis, len(units), tuple(_runs(units)))

    @property
    def name(self) -> str:
        return f"{self.path}.{self.parameter}" if self.path else self.parameter

    @cached_property
    def units(self) -> tuple[int, ...]:
        """The unit of each index, -1 for none."""
        found = [-1] * self.size
        for run in self.runs:
            for index in range(run.count * run.each):
                found[run.start + index] = run.unit + index // run.each
        return tuple(found)

    def staying(self, kept: Collection[int]) -> list[int]:
        """Indices that stay when these units do, in order."""
        kept = set(kept)
        return [index for index, unit in enumerate(self.units) if unit < 0 or unit in kept]


@dataclass(frozen=True)
class Norm:
    """A module that divides the channels by what it computes of them all.

    gain: its parameter by which it multiplies, "" for none; it multiplies by `offset` + gain. eps: its attribute that
    is added to the mean square, "" where none is known. exact: with fewer channels it computes the same as with those
    at zero, once gain and eps are rescaled; a LayerNorm, whose mean is another one, does not.
    """

    path: str
    gain: str = ""
    offset: float = 0.0
    eps: str = ""
    was: float = 0.0
    exact: bool = False


@dataclass(frozen=True)
class Group:
    """Units that can be cut one by one: neurons of a feed-forward network, query heads, channels of a residual stream.

    readers: of the projections that read the units (`ffn.down`, `attn.o`); several where layers share a tensor, and all
    that read the stream. writers: of everything else, by unit. shared: by key-value group; `of` is the key-value group
    of each query head, where several share one. norms: those that the channels go through on the way to their readers.
    """

    kind: Kind
    count: int
    readers: tuple[Axis, ...]
    writers: tuple[Axis, ...]
    shared: tuple[Axis, ...] = ()
    of: tuple[int, ...] = ()
    norms: tuple[Norm, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether fewer units compute the same as all with the others at zero."""
        return all(norm.exact for norm in self.norms)

    @property
    def axes(self) -> tuple[Axis, ...]:
        """All that are divided by unit."""
        return (*self.writers, *self.readers)

    @property
    def places(self) -> tuple[str, ...]:
        """Paths of the projections that read the units."""
        return tuple(axis.path for axis in self.readers)

    @property
    def sharing(self) -> int:
        """Number of key-value groups; of units that share nothing, their number."""
        return max(self.of) + 1 if self.of else self.count

    def moved(self, before: str, after: str) -> Group:
        """The same group of a layer like this one."""
        tables = (self.readers, self.writers, self.shared)
        readers, writers, shared = (
            tuple(replace(axis, path=moved(axis.path, before, after)) for axis in table) for table in tables
        )
        norms = tuple(replace(norm, path=moved(norm.path, before, after)) for norm in self.norms)
        return replace(self, readers=readers, writers=writers, shared=shared, norms=norms)

    def to_json(self) -> dict[str, Any]:
        """Fields that are not empty."""
        data: dict[str, Any] = {"kind": self.kind, "count": self.count}
        for name in TABLES:
            data |= {name: [_axis_json(axis) for axis in getattr(self, name)]} if getattr(self, name) else {}
        data |= {"norms": [list(astuple(norm)) for norm in self.norms]} if self.norms else {}
        return data | ({"of": list(self.of)} if self.of else {})

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Group:
        readers, writers, shared = (tuple(map(_read_axis, data.get(name, ()))) for name in TABLES)
        norms = tuple(Norm(*norm) for norm in data.get("norms", ()))
        return cls(data["kind"], data["count"], readers, writers, shared, tuple(data.get("of", ())), norms)


def joined(groups: Iterable[Group], tensor: Callable[[str], object] = str) -> list[Group]:
    """Groups that have an axis in common are one, since no unit of the one can be cut without the other's.

    tensor: what a name stands for, where some stand for the same.
    Errors: ValueError, with the name of the tensor, where they do not divide it alike.
    """

    def divided(group: Group) -> set[tuple[object, int]]:
        return {(tensor(axis.name), axis.axis) for axis in (*group.axes, *group.shared)}

    found: list[Group] = []
    for group in groups:
        mine = divided(group)
        touching = [each for each in found if mine & divided(each)]
        for other in touching:
            found.remove(other)
            group = _one(other, group)
        found.append(group)
    return found


def _one(first: Group, second: Group) -> Group:
    if (first.count, first.of) != (second.count, second.of):
        raise ValueError(first.readers[0].name)
    tables: list[tuple[Axis, ...]] = []
    for name in TABLES:
        merged: dict[tuple[str, int], Axis] = {}
        for axis in (*getattr(first, name), *getattr(second, name)):
            if merged.setdefault((axis.name, axis.axis), axis) != axis:
                raise ValueError(axis.name)
        tables.append(tuple(merged.values()))
    readers, writers, shared = tables
    norms = tuple(dict.fromkeys((*first.norms, *second.norms)))
    return Group(first.kind, first.count, readers, writers, shared, first.of, norms)


def _runs(units: Sequence[int]) -> Iterable[Run]:
    """As few runs as describe the units from left to right."""
    blocks: list[tuple[int, int, int]] = []  # start, unit, how many indices
    for index, unit in enumerate(units):
        if blocks and blocks[-1][1] == unit:
            start, _, length = blocks[-1]
            blocks[-1] = (start, unit, length + 1)
        else:
            blocks.append((index, unit, 1))
    run: Run | None = None
    for start, unit, length in blocks:
        if run is not None and unit == run.unit + run.count and length == run.each:
            run = replace(run, count=run.count + 1)
            continue
        if run is not None:
            yield run
        run = Run(start, unit, 1, length) if unit >= 0 else None
    if run is not None:
        yield run


def _axis_json(axis: Axis) -> list[Any]:
    runs = [[run.start, run.unit, run.count, run.each] for run in axis.runs]
    return [axis.path, axis.parameter, axis.axis, axis.size, runs]


def _read_axis(data: Sequence[Any]) -> Axis:
    path, parameter, axis, size, runs = data
    return Axis(path, parameter, axis, size, tuple(Run(*run) for run in runs))
