"""Modules that stand in several places: one place is rewritten, and the change is seen in all of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from surgery.anatomy.parts import Part
from surgery.language.program import Statement

if TYPE_CHECKING:
    from torch import nn


def standings(model: nn.Module) -> dict[str, list[str]]:
    """All paths of every module that has more than one, by each of them."""
    paths: dict[int, list[str]] = defaultdict(list)
    for path, module in model.named_modules(remove_duplicate=False):
        paths[id(module)].append(path)
    return {path: group for group in paths.values() if len(group) > 1 for path in group}


def at_one_place(parts: Sequence[Part], shared: Mapping[str, list[str]]) -> tuple[Part, ...]:
    """The parts with each shared module named by its first path; two parts with the same channels of it are one."""
    kept: dict[tuple[object, ...], Part] = {}
    for part in parts:
        group = shared.get(part.path)
        if group is not None:
            part = replace(part, path=group[0], tied=tuple(path for path in part.tied if path not in group))
        kept.setdefault((part.path, part.parameter, part.kind, part.channels), part)
    return tuple(kept.values())


def elsewhere(statement: Statement, parts: Sequence[Part], shared: Mapping[str, list[str]]) -> list[str]:
    """What to warn of: a statement that selects a shared module at some of its places changes it at all of them."""
    chosen = {part.path for part in parts}
    found = []
    for part in parts:
        others = [path for path in shared.get(part.path, ()) if path not in chosen]
        if others and part.layer is not None:
            found.append(f"`{statement}` changes {part.path}, which stands at {others[0]} too")
    return found
