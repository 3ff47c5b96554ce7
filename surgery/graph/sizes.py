"""Which numbers that modules state change when units are cut: found by trying, and checked on the graph.

A choice is right when the groups of the cut model, studied again, are those of the model before without the units: the
same rows of the same tensors, in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, product
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from surgery.anatomy.groups import Group
from surgery.anatomy.inputs import example
from surgery.anatomy.paths import common, outward, within
from surgery.anatomy.shadow import on_shapes, shadow
from surgery.anatomy.stacks import Lists
from surgery.anatomy.streams import literals
from surgery.anatomy.study import studied
from surgery.anatomy.trace import multiply_experts
from surgery.anatomy.units import groups_of
from surgery.errors import GraphError, ModelError
from surgery.graph.configuration import like
from surgery.graph.cutting import CONFIG, STATED, Cut, Size, narrow, staying, tensor_of
from surgery.graph.shaping import Change

MOST = 48
"""Choices of sizes that are tried."""
NORMS = (nn.LayerNorm, nn.RMSNorm)  # they state the shape of their weight
Key = tuple[str, str]  # a module's path within its part of the layer, and an attribute


def with_sizes(model: nn.Module, cuts: Sequence[Cut], changes: Sequence[Change], inputs: Any) -> list[Cut]:
    """The cuts with the sizes that have to change. Works on shapes alone; the model stays as it is.

    A transformers model takes them from one of its family that has the new shapes, where a configuration gives it.
    cuts: of groups of one kind. changes: numbers that a configuration may state. inputs: as of `study`.
    Errors: GraphError S332 where no choice gives a model that computes with the units that stay.
    """
    lists = Lists(model)
    cuts = [cut.leftmost() for cut in cuts]
    found, fixed = zip(*(_candidates(model, cut, lists) for cut in cuts), strict=True)
    reason = ""
    before = _literals(model, inputs) if any(cut.group.norms for cut in cuts) else None
    for sizes in chain(_suggested(model, cuts, changes, found), _tried(found)):
        sized = [replace(cut, sizes=(*each, *more)) for cut, each, more in zip(cuts, sizes, fixed, strict=True)]
        fault = _fault(model, sized, inputs, before)
        if fault is None:
            return sized
        reason = reason or fault
    raise GraphError.of(
        "S332",
        f"{cuts[0].group.places[0]} cannot be cut: {reason}",
        label="no size that a module states makes the rest fit",
        help="let the module hold its number of heads or its width as an attribute, and its forward go by that",
    )


@dataclass
class Candidate:
    """Attributes that have a size which changes: of the like modules at `paths`, from `was` to one of `now`."""

    was: int
    now: tuple[int, ...]
    paths: list[str]


Found = Sequence[Mapping[Key, Candidate]]  # of each cut


def _suggested(
    model: nn.Module, cuts: Sequence[Cut], changes: Sequence[Change], found: Found
) -> Iterator[list[list[Size]]]:
    """What a model of the family with the new shapes states; first without its configuration."""
    double = shadow(model, once=False).module
    narrow(double, cuts)
    shapes = {name: tensor_of(double, name).shape for name in staying(cuts)}
    for made in islice(like(model, changes, shapes), 1):
        for fields in (False, True):
            yield [list(_stated(made, each, fields)) for each in found]


def _stated(made: nn.Module, candidates: Mapping[Key, Candidate], fields: bool) -> Iterator[Size]:
    for (_, name), one in candidates.items():
        if fields or not name.startswith(CONFIG):
            for path in one.paths:
                now = dict(_numbers(made.get_submodule(path))).get(name, one.was)
                if now != one.was:
                    yield Size(path, name, one.was, now)


def _tried(found: Found) -> Iterator[list[list[Size]]]:
    """Choices among what has one of the sizes that change."""
    options = {key: len(one.now) for each in found for key, one in each.items()}
    for choice in _choices(options):
        yield [list(_sizes(each, choice)) for each in found]


def _candidates(model: nn.Module, cut: Cut, lists: Lists) -> tuple[dict[Key, Candidate], list[Size]]:
    """Among the modules around what is cut; and those of which it is clear what they state."""
    changes = _changes(cut)
    found: dict[Key, Candidate] = {}
    fixed: list[Size] = []
    owned: dict[str, dict[int, int]] = {}
    for axis, left in cut.staying():
        matrices = _matrices(model.get_submodule(axis.path))
        if [matrix.dim() for matrix in matrices] == [2] and matrices[0] is tensor_of(model, axis.name):  # not its bias
            owned.setdefault(axis.path, {})[axis.axis] = len(left)
    by_place: dict[Any, list[str]] = {}
    cut_at = [axis.path for axis in (*cut.group.axes, *cut.group.shared)]
    for path in (*cut_at, *(norm.path for norm in cut.group.norms)):
        by_place.setdefault(lists.place(path), []).append(path)
    for paths in by_place.values():
        top = common(*(path.rpartition(".")[0] for path in paths))
        inside = {outer for path in paths for outer in outward(path)}
        around = {top} | {outer for outer in inside if within(outer, top)}
        for path in sorted(around):
            module = model.get_submodule(path)
            if type(module) in STATED or (isinstance(module, NORMS) and module._parameters.get("weight") is not None):
                continue
            known = _by_axis(model, type(module)) if path in owned else {}
            for name, value in _numbers(module):
                if name in known:
                    if known[name] in owned[path]:
                        fixed.append(Size(path, name, value, owned[path][known[name]]))
                    continue
                if value in changes and not _counts(model, module, name, lists):
                    key = (path[len(top) :], name)
                    one = found.setdefault(key, Candidate(value, tuple(sorted(changes[value])), []))
                    one.paths += [path] if value == one.was else []
    return found, fixed


def _matrices(module: nn.Module) -> list[torch.Tensor]:
    return [tensor for tensor in module._parameters.values() if tensor is not None and tensor.dim() > 1]


def _by_axis(model: nn.Module, kind: type[nn.Module]) -> dict[str, int]:
    """Attributes of a class that state one axis of its one matrix, wherever there is one."""
    found: dict[str, set[int]] = {}
    for module in model.modules():
        if type(module) is kind:
            shape = _matrices(module)[0].shape if len(_matrices(module)) == 1 else ()
            for name, value in _numbers(module):
                axes = {axis for axis, size in enumerate(shape) if size == value}
                found[name] = found[name] & axes if name in found else axes
    return {name: min(axes) for name, axes in found.items() if len(axes) == 1}


def _numbers(module: nn.Module) -> Iterator[tuple[str, int]]:
    for name, value in vars(module).items():
        if type(value) is int and name[0] != "_":
            yield name, value
        elif type(value) is tuple and len(value) == 1 and type(value[0]) is int:  # a norm's shape
            yield name, value[0]
    config: Any = vars(module).get("config")
    if hasattr(config, "to_dict"):
        for name, value in vars(config).items():
            if type(value) is int and name[0] != "_":
                yield CONFIG + name, value


def _counts(model: nn.Module, module: nn.Module, name: str, lists: Lists) -> bool:
    """Whether an attribute is the number of the layer that the module stands in, and no size."""
    offsets: dict[int, int] = {}
    for path, other in model.named_modules():
        place = lists.place(path)
        if place is not None and type(other) is type(module) and type(vars(other).get(name)) is int:
            offsets[place.layer] = vars(other)[name] - place.layer
    return len(offsets) > 1 and len(set(offsets.values())) == 1


def _changes(cut: Cut) -> dict[int, set[int]]:
    """Sizes that are others after the cut: of units, of groups, of axes, of the runs in them."""
    group = cut.group
    pairs = [(group.count, len(cut.kept))]
    if group.of:
        pairs += [(group.sharing, len(cut.shared))]
        pairs += [(group.count // group.sharing, len(cut.kept) // len(cut.shared))]
    for axis, left in cut.staying():
        kept = set(left)
        pairs.append((axis.size, len(left)))
        for run in axis.runs:
            wide = range(run.start, run.start + run.count * run.each)
            pairs.append((len(wide), sum(index in kept for index in wide)))
    found: dict[int, set[int]] = {}
    for was, now in pairs:
        if was != now:
            found.setdefault(was, set()).add(now)
    return found


def _choices(options: Mapping[Key, int]) -> Iterator[dict[Key, int]]:
    """Which option each takes, those first where most attributes change.

    Fields of a configuration, which others read as well, change only where nothing else will do, one before two.
    """
    stated = [key for key in options if key[1][: len(CONFIG)] != CONFIG]
    fields = [key for key in options if key not in stated][:8]
    settings = sorted(product(*([*range(options[key]), None] for key in stated[:8])), key=lambda c: c.count(None))
    configured = sorted(product(*([None, *range(options[key])] for key in fields)), key=lambda c: -c.count(None))
    for chosen in configured[: MOST // 3]:
        for setting in settings[:MOST]:
            taken = zip((*stated[:8], *fields), (*setting, *chosen), strict=True)
            yield {**dict.fromkeys(stated[8:], 0), **{key: option for key, option in taken if option is not None}}


def _sizes(candidates: Mapping[Key, Candidate], choice: Mapping[Key, int]) -> Iterator[Size]:
    for key, one in candidates.items():
        if key in choice:
            now = one.now[min(choice[key], len(one.now) - 1)]
            yield from (Size(path, key[1], one.was, now) for path in one.paths)


def _fault(model: nn.Module, cuts: Sequence[Cut], inputs: Any, before: Sequence[float] | None = None) -> str | None:
    """What is wrong with the model after these cuts; None when it is right.

    before: the numbers in its code, where some may be made of a size.
    """
    double = shadow(model, once=False).module
    narrow(double, cuts)
    fault = _stumbles(double, inputs)
    if fault is not None:
        return fault
    try:
        with studied(double, inputs) as roles:
            groups, refused = groups_of(roles, cuts[0].group.kind)
            numbers = literals(roles.flow) if before is not None else None
    except ModelError as error:
        return error.diagnostics[0].message
    if numbers is not None and before is not None and not _only_norms(before, numbers, cuts):
        return "a number in its forward is made of the width"
    by_reader = {place: group for group in groups for place in group.places}
    for cut in cuts:
        place = cut.group.places[0]
        if place not in by_reader:
            return refused.get(place, f"{place} is not what it was")
        if not _same(by_reader[place], cut):
            return f"{place} would read other rows than it did"
    return None


def _literals(model: nn.Module, inputs: Any) -> list[float]:
    with studied(model, inputs) as roles:
        return literals(roles.flow)


def _only_norms(before: Sequence[float], after: Sequence[float], cuts: Sequence[Cut]) -> bool:
    """Whether no number in the code is another one but what norms add."""
    ratios = {cut.group.count / len(cut.kept) for cut in cuts}
    return len(before) == len(after) and all(
        one == other or any(math.isclose(one * ratio, other, rel_tol=1e-9) for ratio in ratios)
        for one, other in zip(before, after, strict=True)
    )


def _stumbles(double: nn.Module, inputs: Any) -> str | None:
    """Why a model without weights cannot be run; None as well where it is not known how."""
    multiply_experts(double, "batched_mm")
    try:
        given = example(double, torch.device("meta")) if inputs is None else inputs
        given = tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, given)
        with torch.no_grad():
            on_shapes(lambda: double(**given) if isinstance(given, Mapping) else double(*given))
    except RuntimeError as error:
        told = str(error).splitlines()[0]
        return None if "meta" in told else f"shapes do not fit: {told}"
    except (NotImplementedError, ModelError):
        return None
    except Exception as error:  # whatever a model's own code says to sizes that do not go together
        return f"{type(error).__name__}: {error}"
    return None


def _same(group: Group, cut: Cut) -> bool:
    """Whether a group is what a cut leaves of its own: every index that stayed belongs to the unit that it did."""
    if group.count != len(cut.kept):
        return False
    left = staying([cut])
    alone = max(group.of, default=1) == 0  # one group of keys is left: what belongs to it belongs to all heads
    tables = [
        (cut.group.axes, cut.kept, group.axes),
        (() if alone else cut.group.shared, cut.shared, group.shared if group.of else group.axes),
    ]
    for before, kept, after in tables:
        number = {unit: place for place, unit in enumerate(kept)}
        found = {(axis.name, axis.axis): axis.units for axis in after}
        for axis in before:
            units = found.get((axis.name, axis.axis), ())
            indices = left[axis.name][axis.axis][1]
            if len(units) != len(indices):
                return False
            wanted = [number.get(axis.units[index], -1) for index in indices]
            if any(want not in (-1, unit) for want, unit in zip(wanted, units, strict=True)):
                return False
    return True
