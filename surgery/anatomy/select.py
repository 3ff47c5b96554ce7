"""Selections: which parts of a model a selector means. Sets of channels at places, with the laws of sets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache

from surgery.anatomy.absent import layer_missing, no_match, nothing_left, role_missing, stack_missing
from surgery.anatomy.parts import Anatomy, Kind, Part
from surgery.language.selector import Difference, Glob, Intersection, Layers, Role, Selector, Union

MATRICES = ("projection", "experts")
Runs = tuple[tuple[int, int], ...]
Place = tuple[Kind, str, str]


def select(anatomy: Anatomy, selector: Selector, kinds: tuple[Kind, ...]) -> tuple[Part, ...]:
    """Parts of these kinds that the selector means, in execution order, no channel of a role twice.

    Raises ModelError S203 (the model has no such role), S204 (no such stack), S205 (no such layer), S206 (no such
    path), S207 (nothing is left, or nothing that the operation acts on).
    """
    parts = Chooser(anatomy, kinds).choose(selector)
    if "attention" in kinds and not names_cross(selector):
        parts = [part for part in parts if not (part.kind == "attention" and part.role == "cross")]
    if not parts:
        raise nothing_left(anatomy, selector, kinds)
    return tuple(parts)


class Chooser:
    """Evaluates selectors over one anatomy, for parts of some kinds."""

    def __init__(self, anatomy: Anatomy, kinds: tuple[Kind, ...]) -> None:
        self.anatomy = anatomy
        self.kinds = kinds
        self.depth = {stack.name: stack.depth for stack in anatomy.stacks}
        self.order: dict[Place, int] = {}
        for index, part in enumerate(anatomy.parts):
            self.order.setdefault(place(part), index)

    def choose(self, selector: Selector) -> list[Part]:
        if isinstance(selector, Role):
            return self.tidy(self.role(selector))
        if isinstance(selector, Glob):
            return self.tidy(self.glob(selector))
        if isinstance(selector, Layers):
            return self.tidy(self.layers(selector))
        if isinstance(selector, Union):
            return self.tidy(part for item in selector.items for part in self.choose(item))
        if isinstance(selector, Intersection):
            return self.tidy(common(self.choose(selector.whole), self.choose(selector.scope)))
        return self.tidy(without(self.choose(selector.whole), self.choose(selector.cut)))

    def tidy(self, parts: Iterable[Part]) -> list[Part]:
        """Sorted, each role's channels at a place joined, and no role where the whole place is chosen anyway."""
        joined: dict[tuple[Place, str], Part] = {}
        for part in parts:
            key = (place(part), part.role)
            joined[key] = part if key not in joined else with_runs(part, merge(runs(joined[key]), runs(part)))
        whole = {where: runs(part) for (where, role), part in joined.items() if role == "linear"}
        kept = [
            part
            for (where, role), part in joined.items()
            if role == "linear" or where not in whole or subtract(runs(part), whole[where])
        ]
        return sorted(kept, key=lambda part: (self.order[place(part)], runs(part), part.role))

    def role(self, selector: Role) -> list[Part]:
        name = selector.name
        if name in ("linear", "base"):
            found = [whole(part) for part in self.anatomy.parts if of_matrix(part) and not self.is_apart(part)]
        elif name == "bias":
            found = [part for part in self.anatomy.parts if part.kind == "bias"]
            if "bias" not in self.kinds:
                return []
        elif name == "layers":
            found = [whole(part) for part in self.anatomy.parts if part.layer is not None]
        else:
            found = [part for part in self.anatomy.parts if part.role == name or part.role.startswith(f"{name}.")]
            paths = {part.path for part in found if part.kind == "projection"}
            found += [part for part in self.anatomy.parts if part.role == "bias.new" and part.path in paths]
        if not found:
            raise role_missing(self.anatomy, selector)
        return [part for part in found if part.kind in self.kinds]

    def is_apart(self, part: Part) -> bool:
        """Heads and routers decide; they are named by those who mean them."""
        return (part.path, part.parameter) in self.apart

    @cached_property
    def apart(self) -> set[tuple[str, str]]:
        return {(part.path, part.parameter) for part in self.anatomy.parts if part.role in ("head", "router")}

    def glob(self, selector: Glob) -> list[Part]:
        pattern = compiled(selector.pattern)
        found = [
            whole(part)
            for part in self.anatomy.parts
            if pattern.fullmatch(part.path)
            or (part.kind == "experts" and pattern.fullmatch(f"{part.path}.{part.parameter}"))
        ]
        if not found:
            raise no_match(self.anatomy, selector)
        return [part for part in found if part.kind in self.kinds]

    def layers(self, selector: Layers) -> list[Part]:
        stacks = self.depth
        if selector.stack is not None:
            if selector.stack not in self.depth:
                raise stack_missing(self.anatomy, selector)
            stacks = {selector.stack: self.depth[selector.stack]}
        chosen = {(name, index) for name, depth in stacks.items() for index in indices(selector, depth)}
        out_of_range = all(not in_range(selector, depth) for depth in stacks.values())
        if out_of_range or (not chosen and selector.parity is None):
            raise layer_missing(self.anatomy, selector, stacks)
        return [
            whole(part) for part in self.anatomy.parts if part.kind in self.kinds and (part.stack, part.layer) in chosen
        ]


def in_range(selector: Layers, depth: int) -> bool:
    ends = [end for end in (selector.first, selector.last) if end is not None]
    return all(-depth <= end < depth for end in ends)


def indices(selector: Layers, depth: int) -> Sequence[int]:
    """Layers of a stack of some depth that the selector names."""
    first = 0 if selector.first is None else selector.first
    last = (depth - 1 if selector.first is None else first) if selector.last is None else selector.last
    first, last = (end + depth if end < 0 else end for end in (first, last))
    found = range(max(first, 0), min(last, depth - 1) + 1)
    if selector.parity is not None:
        return [index for index in found if index % 2 == (selector.parity == "odd")]
    return found


def place(part: Part) -> Place:
    return part.kind, part.path, part.parameter


def whole(part: Part) -> Part:
    """A matrix, or the bias of one, without its role; anything else as it is."""
    return part.whole() if of_matrix(part) and part.role != "bias.new" else part


def of_matrix(part: Part) -> bool:
    """Whether a part is a matrix or the bias of one."""
    return part.kind in MATRICES or (part.kind == "bias" and part.role not in ("norm", "other"))


def names_cross(selector: Selector) -> bool:
    """Whether cross attention is meant: named as a role, or given by path."""
    if isinstance(selector, Role):
        return selector.name.partition(".")[0] == "cross"
    if isinstance(selector, Glob):
        return True
    if isinstance(selector, Union):
        return any(names_cross(item) for item in selector.items)
    if isinstance(selector, Intersection):
        return names_cross(selector.whole) or names_cross(selector.scope)
    return names_cross(selector.whole) if isinstance(selector, Difference) else False


def runs(part: Part) -> Runs:
    """Channels of a part; (0, 1) stands for what has none."""
    if part.channels is not None:
        return part.channels
    if part.kind == "bias":
        return ((0, part.shape[0]),)
    return ((0, part.shape[-2] if part.kind in MATRICES and len(part.shape) > 1 else 1),)


def with_runs(part: Part, channels: Runs) -> Part:
    full = runs(replace(part, channels=None))
    return replace(part, channels=None if channels == full else channels)


def merge(one: Runs, other: Runs) -> Runs:
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(one + other):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(merged)


def subtract(one: Runs, cut: Runs) -> Runs:
    left = []
    for start, stop in one:
        for cut_start, cut_stop in cut:
            if cut_start < stop and cut_stop > start:
                if start < cut_start:
                    left.append((start, cut_start))
                start = cut_stop
                if start >= stop:
                    break
        if start < stop:
            left.append((start, stop))
    return tuple(left)


def intersect(one: Runs, other: Runs) -> Runs:
    return subtract(one, subtract(one, other))


def without(parts: list[Part], cut: list[Part]) -> list[Part]:
    """The parts less the channels that the cut has at the same places."""
    gone: dict[Place, Runs] = {}
    for part in cut:
        gone[place(part)] = merge(gone.get(place(part), ()), runs(part))
    left = []
    for part in parts:
        remaining = subtract(runs(part), gone.get(place(part), ()))
        if remaining:
            left.append(with_runs(part, remaining))
    return left


def common(parts: list[Part], scope: list[Part]) -> list[Part]:
    """Channels in both, under the more telling role of the two."""
    found = []
    beside: dict[Place, list[Part]] = {}
    for part in scope:
        beside.setdefault(place(part), []).append(part)
    for part in parts:
        for other in beside.get(place(part), ()):
            shared = intersect(runs(part), runs(other))
            if shared:
                told = other if part.role == "linear" else part
                found.append(with_runs(told, shared))
    return found


@lru_cache(maxsize=256)
def compiled(pattern: str) -> re.Pattern[str]:
    """`*` and `?` stay within one path component, `**` does not, `[...]` is a set of characters."""
    pieces = re.split(r"(\*\*|\*|\?|\[[^\]]*\])", pattern)
    known = {"**": ".*", "*": "[^.]*", "?": "[^.]"}
    translated = [
        known.get(piece, piece.replace("[!", "[^", 1) if piece.startswith("[") else re.escape(piece))
        for piece in pieces
    ]
    try:
        return re.compile("".join(translated))
    except re.error:
        return re.compile(re.escape(pattern))
