"""The configuration that gives a reshaped transformers model, found by trying: which of its numbers have to change.

Nothing is known of what a family calls its numbers. Those that had the old value are candidates; the ones are right
whose model has the names, shapes and plain attributes of the reshaped one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, combinations, islice, product
from typing import Any

import torch
from torch import nn

from surgery.graph.shaping import Change
from surgery.graph.undo import configurations

MOST = 256
"""Combinations of fields that are tried."""
PLAIN = (bool, int, float, str, type(None))
STATES = ("training", "name_or_path", "gradient_checkpointing")
"""Attributes that say what a module is doing, not what it is."""


def fit(model: nn.Module, changes: Sequence[Change]) -> bool:
    """Let a transformers model's configuration say its new shape; whether `from_pretrained` would build it so.

    Where no choice of fields gives the same model, the likeliest are changed all the same, and the number of layers in
    any case, for caches to be of the right size.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return False
    likeliest: dict[str, Any] | None = None
    for fields in _choices(config, changes):
        made = _made(type(model), config, fields)
        if made is None or _shapes(made) != _shapes(model):
            continue
        if _alike(model, made):
            _follow(model, made, fields)
            return True
        likeliest = likeliest or fields
    layers = [each for each in changes if each.kept is not None]  # widths that no field gives are in none
    _say(model, likeliest or next(_choices(config, layers), {}), {each.was: each.now for each in layers})
    return False


def like(model: nn.Module, changes: Sequence[Change], shapes: Mapping[str, torch.Size]) -> Iterator[nn.Module]:
    """Models of the family, without weights, whose configuration has these changes and whose tensors these shapes."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        for fields in _choices(config, changes):
            made = _made(type(model), config, fields)
            found = {} if made is None else _shapes(made)
            if made is not None and all(found.get(name) == shape for name, shape in shapes.items()):
                yield made


def _say(model: nn.Module, fields: dict[str, Any], now: dict[float, float]) -> None:
    """Set the fields everywhere; in a copy where one means another stack, what that stack has become."""
    first, *others = configurations(model)
    for config in others:
        for name, value in fields.items():
            held = vars(config).get(name)
            if held == vars(first).get(name) and name in vars(config):
                setattr(config, name, copy.copy(value))
            elif type(held) is int and held in now:
                setattr(config, name, now[held])
    for name, value in fields.items():
        setattr(first, name, value)


def _choices(config: Any, changes: Sequence[Change]) -> Iterator[dict[str, Any]]:
    """What fields could change to, likelier ones first: one number for each change, then several."""
    lists: dict[str, Any] = {}
    for change in (each for each in changes if each.kept is not None):
        for name, value in vars(config).items():
            if isinstance(value, (list, tuple)) and len(value) == change.was:
                shorter = type(value)(value[index] for index in change.kept or ())
                if _takes(config, name, shorter):
                    lists[name] = shorter
    options = [list(_subsets(_candidates(config, change.was))) for change in changes]
    for chosen in islice(product(*options), MOST):
        fields = dict(lists)
        for change, names in zip(changes, chosen, strict=True):
            fields.update(dict.fromkeys(names, change.now))
        yield fields


def _takes(config: Any, name: str, value: Any) -> bool:
    """Whether a field may have this value: one of as many entries as there are layers may be a pair of limits."""
    try:
        setattr(copy.copy(config), name, value)
    except Exception:  # what checks it is the configuration's own
        return False
    return True


def _candidates(config: Any, value: float) -> list[str]:
    alike = type(value)
    return [name for name, held in vars(config).items() if type(held) is alike and held == value and name[0] != "_"]


def _subsets(names: Sequence[str]) -> Iterable[tuple[str, ...]]:
    """Every choice that is not empty, small ones first; the empty one where there is no other."""
    found = chain.from_iterable(combinations(names, size) for size in range(1, len(names) + 1))
    return found if names else [()]


def _made(cls: type[nn.Module], config: Any, fields: dict[str, Any]) -> nn.Module | None:
    """A model of the configuration with these fields, on the meta device; None where there is none."""
    tried = copy.deepcopy(config)
    try:
        for name, value in fields.items():
            setattr(tried, name, value)
        if hasattr(tried, "validate"):
            tried.validate()  # as it is when it is written and read
        with torch.device("meta"):
            return cls(tried)
    except Exception:  # whatever a family's own code says to numbers that do not go together
        return None


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: tensor.shape for name, tensor in tensors}


def _alike(model: nn.Module, made: nn.Module) -> bool:
    """Whether the modules are of the same classes, with the same numbers and words among their attributes."""
    mine, others = dict(model.named_modules()), dict(made.named_modules())
    return mine.keys() == others.keys() and all(
        type(mine[path]) is type(others[path]) and _plain(mine[path]) == _plain(others[path]) for path in mine
    )


def _plain(module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, PLAIN) and name[0] != "_" and name not in STATES
    }


def _follow(model: nn.Module, made: nn.Module, fields: Iterable[str]) -> None:
    """Take over what the configurations say at every module: some hold a copy in which a field means another stack."""
    others = dict(made.named_modules())
    for path, module in model.named_modules():
        for name, config in vars(module).items():
            if hasattr(config, "to_dict") and hasattr(config, "model_type"):
                said = vars(getattr(others[path], name))
                vars(config).update({field: copy.copy(said[field]) for field in said if field in _told(said, fields)})


def _told(said: dict[str, Any], fields: Iterable[str]) -> set[str]:
    """The fields, and what a family derives from them: plain numbers and lists."""
    return {name for name, value in said.items() if name in fields or (type(value) is int and name[0] != "_")}
