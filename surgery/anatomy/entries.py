"""Entries: where a stack takes its input, so that more can come in front of it; found from lookups and stacks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from surgery.anatomy.parts import Anatomy, Part, Stack
from surgery.anatomy.paths import common, depth

ROLE = "entry"
FRONT, INSIDE, CALL = f"{ROLE}.front", f"{ROLE}.rows", f"{ROLE}.attn"
"""Roles: rows that a causal stack reads first, rows in front of an encoder's tokens, attention calls of a stack."""


def with_entries(anatomy: Anatomy, model: nn.Module) -> Anatomy:
    """The anatomy with a part of kind `entry` for each stack that has one, and its attention calls under role `entry`.

    An entry's path is the module that takes the tokens and runs the stack; `input` is the lookup of word embeddings as
    it stands in there, `shape` that of its table.
    """
    parts = [part for part in anatomy.parts if part.kind != "attention" or part.role == "cross"]
    for stack in anatomy.stacks:
        calls = [part for part in anatomy.parts if part.role == "attn" and part.kind == "attention"]
        calls = [part for part in calls if part.stack == stack.name]
        found = entry(anatomy, model, stack) if calls else None
        if found is not None:
            parts += [found, *(replace(part, role=CALL) for part in calls)]
    return replace(anatomy, parts=tuple(parts))


def entry(anatomy: Anatomy, model: nn.Module, stack: Stack) -> Part | None:
    """The entry of a stack, None where no lookup of word embeddings stands beside it."""
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(path)
    found = [
        (common(path, stack.path), part, path)
        for part in anatomy.parts
        if part.role == "embed" and part.kind == "lookup"
        for path in names[id(model.get_submodule(part.path))]
    ]
    if not found:
        return None
    shared, part, path = max(found, key=lambda each: (depth(each[0]), each[1].shape[0]))
    role = FRONT if causal(stack) else INSIDE
    return Part(role, "entry", callable_at(model, shared), "", part.shape, stack=stack.name, layer=0, input=path)


def causal(stack: Stack) -> bool:
    """Whether a stack hides later tokens; its name says so, which dataflow gave it."""
    return stack.name.startswith("decoder")


def callable_at(model: nn.Module, path: str) -> str:
    """The innermost module at or above a path that is called, which lists are not."""
    while path and isinstance(model.get_submodule(path), (nn.ModuleList, nn.ModuleDict)):
        path = path.rpartition(".")[0]
    return path


def without_attention(anatomy: Anatomy, path: str) -> str | None:
    """A layer below a path that mixes tokens without attention: what comes first leaves no keys and values there."""
    below: Any = f"{path}." if path else ""
    return next((p.path for p in anatomy.parts if p.role.startswith("mixer.") and p.path.startswith(below)), None)
