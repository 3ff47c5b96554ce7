"""Where a model reads positions: with n positions put in front of its tokens, these stand at n, n + 1, and so on.

Positions are shifted where they are used, at the lookup in a learned table or at the module that turns them into
rotations, so that nothing else of the model (masks, caches, token types) sees the shift. Only where a model reads them
in no module of their own are they shifted at its entry.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from surgery.anatomy.parts import Part
from surgery.anatomy.paths import within
from surgery.errors import PlanError
from surgery.graph.hooks import drop
from surgery.graph.module import Rewritten
from surgery.graph.settle import Settling

ARGUMENTS = ("position_ids", "positions", "input_pos")


@dataclass(frozen=True)
class Point:
    """One place where positions are read.

    lookup: the module is called with indices into a table of `rows` rows; argument: it takes them by that name;
    entry: as argument, and counts them itself when they are not given.
    scope: the module that holds both this and the attention that it is for.
    """

    path: str
    kind: Literal["lookup", "argument", "entry"]
    scope: str
    argument: str = ""
    rows: int | None = None


@dataclass
class Amounts:
    """By how much positions are shifted now: the longest of the prefixes that are on, and each by attention site.

    less: positions of prompts that are not in front yet, while the model reads them.
    """

    of: dict[str, int] = field(default_factory=dict)
    most: int = 0
    less: int = 0

    @property
    def now(self) -> int:
        return max(self.most - self.less, 0)

    def set(self, path: str, length: int) -> None:
        self.of[path] = length
        self.most = max(self.of.values())


class Shift:
    """A forward pre-hook that adds to the positions a module is called with."""

    def __init__(self, point: Point, amounts: Amounts, place: int) -> None:
        self.point, self.amounts, self.place = point, amounts, place

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        amount = self.amounts.now
        if amount == 0:
            return None
        name = self.point.argument
        if name in kwargs and kwargs[name] is not None:
            return args, {**kwargs, name: kwargs[name] + amount}
        if len(args) > self.place and args[self.place] is not None:
            return (*args[: self.place], args[self.place] + amount, *args[self.place + 1 :]), kwargs
        if self.point.kind != "entry":
            return None
        return args, {**kwargs, name: _counted(args, kwargs) + amount}


class FromMask:
    """A forward pre-hook that counts positions without padding, as `generate` does, where the caller gives none.

    A model whose positions are relative gives the same for any padding on the left. With positions in front it would
    not: counted from the start of the row, its tokens would stand further from them.
    """

    def __init__(self, argument: str, amounts: Amounts, names: tuple[str, ...]) -> None:
        self.argument, self.amounts, self.names = argument, amounts, names

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        mask = given.get("attention_mask")
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if self.amounts.most == 0 or given.get(self.argument) is not None or tokens is None:
            return None
        if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < tokens.shape[1]:
            return None
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        place = self.names.index(self.argument)
        if len(args) > place:
            return (*args[:place], positions, *args[place + 1 :]), kwargs
        return args, {**kwargs, self.argument: positions}


class Reread:
    """A forward hook for a table that counts positions itself when none are given: it reads n rows further on."""

    def __init__(self, shift: Shift) -> None:
        self.shift = shift

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        amount, name, place = self.shift.amounts.now, self.shift.point.argument, self.shift.place
        given = kwargs.get(name) if name in kwargs else (args[place] if len(args) > place else None)
        if amount == 0 or given is not None:
            return output
        further = object.__new__(type(module))
        further.__dict__ = {**module.__dict__}
        weight = module._parameters["weight"]
        assert weight is not None
        further.__dict__["_parameters"] = {**module._parameters, "weight": weight[amount:]}
        return further.forward(*args, **kwargs)


def _counted(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The positions (1, length) that a model counts by itself: on from what its cache has seen."""
    tokens = next(each for each in (*args, *kwargs.values()) if isinstance(each, Tensor) and each.dim() >= 2)
    cache = kwargs.get("past_key_values")
    seen = 0 if cache is None else cache.get_seq_length()
    return (torch.arange(tokens.shape[1], device=tokens.device) + seen)[None]


def points(model: nn.Module, parts: Iterable[Part]) -> tuple[Point, ...]:
    """Every place where the model reads positions. parts: its attention and position parts."""
    parts = tuple(parts)
    attention = {part.path for part in parts if part.kind == "attention"}
    tables = {part.path: part.shape[0] for part in parts if part.role == "position"}
    found = [point for path, rows in tables.items() if (point := _table(model, path, rows, attention)) is not None]
    closed = attention | {point.path for point in found}
    above = {each for path in closed for each in _above(path)}
    for path, module in model.named_modules():
        if path in closed or path in above or any(each in closed for each in _above(path) if each not in attention):
            continue
        if argument := _argument(module):
            found.append(Point(path, "argument", _scope(path, attention), argument))
            closed.add(path)
    return (*found, *_entries(model, attention, {point.scope for point in found}))


def _entries(model: nn.Module, attention: set[str], served: set[str]) -> Iterator[Point]:
    """Where positions are read in no module of their own: the innermost modules that take them for several layers."""
    for path in _counting(model, attention):
        if not any(within(each, path) or within(path, each) for each in served):
            yield Point(path, "entry", path, _argument(model.get_submodule(path)))


def _counting(model: nn.Module, attention: set[str]) -> list[str]:
    """The innermost modules that take positions for several attention calls."""
    held = Counter(each for path in attention for each in _above(path))
    takes = {path for path, count in held.items() if count > 1 and _argument(model.get_submodule(path))}
    return sorted(takes - {each for path in takes for each in _above(path)})


def _above(path: str) -> Iterator[str]:
    """Paths of the modules that hold this one, the model itself last."""
    while path:
        path = path.rpartition(".")[0]
        yield path


def _table(model: nn.Module, path: str, rows: int, attention: set[str]) -> Point | None:
    """The point of a learned table; None for a table inside an attention, which holds distances and not positions."""
    if any(within(path, each) for each in attention):
        return None
    module: Any = model.get_submodule(path)
    original = module.original if isinstance(module, Rewritten) else module
    argument = "" if type(original).forward is nn.Embedding.forward else _argument(original)
    return Point(path, "argument" if argument else "lookup", _scope(path, attention), argument, rows)


def _argument(module: nn.Module) -> str:
    """The name under which a module takes positions, empty if it takes none."""
    names = inspect.signature(module.forward).parameters
    return next((name for name in ARGUMENTS if name in names), "")


def _scope(path: str, attention: set[str]) -> str:
    """The nearest module above a path that holds attention."""
    while path and not any(within(each, path) for each in attention):
        path = path.rpartition(".")[0]
    return path


def check(model: nn.Module, parts: Iterable[Part], lengths: Mapping[str, int]) -> tuple[str, ...]:
    """What to warn of when so many positions are put in front of the attention calls at these paths.

    Raises PlanError S346 when a table of positions has no room for them.
    """
    warnings = []
    found = points(model, parts)
    for point in found:
        most = max((n for path, n in lengths.items() if within(path, point.scope)), default=0)
        if point.rows is not None and most >= point.rows:
            raise PlanError.of(
                "S346",
                f"{most} positions in front leave no room for tokens: the table at {point.path} has {point.rows} rows",
                help=f"take fewer than {point.rows}",
            )
        if point.rows is not None and most:
            warnings.append(
                f"sequences may have {point.rows - most} tokens at most, {point.rows} before ({point.path})"
            )
    if any(n and not any(within(path, point.scope) for point in found) for path, n in lengths.items()):
        warnings.append("positions are not shifted: no module of the model takes them (or they are distances anyway)")
    return tuple(warnings)


def install(model: nn.Module, parts: Iterable[Part]) -> None:
    """Shift positions by what the model's attention sites put in front now. Repeat it after every change of them."""
    drop(model, lambda hook: isinstance(hook, (FromMask, Shift, Reread)))
    parts = tuple(parts)
    sites = {path: module for path, module in model.named_modules() if isinstance(module, Shifting)}
    for path in _counting(model, {part.path for part in parts if part.kind == "attention"}):
        module, amounts = model.get_submodule(path), Amounts()
        names = tuple(inspect.signature(module.forward).parameters)
        for place, site in sites.items():
            if site.lengths() and within(place, path):
                site.inform(place, amounts)
        if amounts.of and "attention_mask" in names:
            module.register_forward_pre_hook(FromMask(_argument(module), amounts, names), with_kwargs=True)
    for point in points(model, parts):
        amounts = Amounts()
        for path, module in sites.items():
            if module.lengths() and within(path, point.scope):
                module.inform(path, amounts)
        if amounts.of:
            target = model.get_submodule(point.path)
            shift = Shift(point, amounts, _place(target, point))
            target.register_forward_pre_hook(shift, with_kwargs=True)
            if point.rows is not None and point.argument:
                target.register_forward_hook(Reread(shift), with_kwargs=True)


def _place(module: nn.Module, point: Point) -> int:
    """The place of the positions among the arguments."""
    return list(inspect.signature(module.forward).parameters).index(point.argument) if point.argument else 0


class Shifting(Settling):
    """A rewritten attention call, which tells the points of its model how many positions it puts in front.

    ahead: keys in front of the model's own now, in cross-attention too, where no position is shifted for them.
    less: how many of them are not there yet, while the model reads what is to stand in front.
    """

    ahead: int
    less: int = 0
    informed: tuple[tuple[str, Amounts], ...] = ()

    def lengths(self) -> dict[str, int]:
        """Positions in front, by name of their branch."""
        return self._counted("positions")

    def _counted(self, what: str) -> dict[str, int]:
        counted: Counter[str] = Counter()
        for node in self.full.nodes:
            if what in node.meta:  # several statements may have one name
                counted[node.meta["joint"]] += node.meta[what]
        return counted

    def _describe(self, *values: Any) -> None:
        super()._describe(*values)
        self._count()

    def _count(self) -> None:
        on = [length for name, length in self._counted("front").items() if name not in self.off]
        object.__setattr__(self, "ahead", sum(on))

    def inform(self, path: str, amounts: Amounts) -> None:
        """Keep these amounts up to date from now on."""
        object.__setattr__(self, "informed", (*self.informed, (path, amounts)))
        self._tell()

    def _tell(self) -> None:
        on = [length for name, length in self.lengths().items() if name not in self.off]
        for path, amounts in self.informed:
            amounts.set(path, sum(on))

    def switch(self, off: Any) -> None:
        super().switch(off)
        self._count()
        self._tell()

    def __deepcopy__(self, memo: dict[int, Any]) -> Shifting:
        copied: Shifting = super().__deepcopy__(memo)  # type: ignore[assignment]
        object.__setattr__(copied, "informed", copy.deepcopy(self.informed, memo))
        return copied
