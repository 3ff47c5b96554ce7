"""Where soft rows enter an encoder and leave it, by what its anatomy says of lookups, lists and positions."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from surgery.anatomy.entries import callable_at
from surgery.anatomy.parts import Anatomy, Part, Stack
from surgery.anatomy.paths import common, within
from surgery.anatomy.stacks import layers_of
from surgery.errors import PlanError

STATES = ("encoder_hidden_states", "memory")
"""Names under which a decoder takes the encoder's output."""


@dataclass(frozen=True)
class Entrance:
    """Where rows enter and leave a model; paths of modules.

    root: takes the tokens and runs the stack. lookup: gives word embeddings of `width`. leave: what has the last
    layer's output: the list's owner, or, where that is the root, the last layer (the root where layers are spread over
    several lists). keeps: a decoder attends to the rows,
    so they stay. readers: modules that read the encoder's output and a mask for it. room: positions of a learned
    table, None without one. placeholder: a token that means nothing special.
    """

    root: str
    lookup: str
    leave: str
    keeps: bool
    readers: tuple[str, ...]
    room: int | None
    placeholder: int
    width: int

    @classmethod
    def find(cls, model: nn.Module, anatomy: Anatomy, stack: Stack) -> Entrance:
        """The entrance of a bidirectional stack. PlanError S394 where no lookup gives word embeddings for it."""
        owner = callable_at(model, stack.path.rpartition(".")[0])
        found = [part for part in anatomy.parts if part.role == "embed" and part.kind == "lookup"]
        if not found:
            raise PlanError.of(
                "S394",
                f"no rows can be put in front of the tokens of {stack.path}: no lookup of word embeddings is known",
                help="soft prompts need a model that takes token numbers",
            )
        shared = {part.path: common(part.path, owner) for part in found}
        part = max(found, key=lambda part: (len(shared[part.path].split(".")) if shared[part.path] else 0, part.shape))
        root = callable_at(model, shared[part.path])
        leave = owner
        single = any(p.role == "layer" and p.stack == stack.name for p in anatomy.parts)
        if owner == root and single:
            last = list(layers_of(model.get_submodule(stack.path)))[-1]
            leave = f"{stack.path}.{last}" if stack.path else last
        keeps = any(p.kind == "attention" and p.role == "cross" and p.stack != stack.name for p in anatomy.parts)
        # Some decoders attend to the encoder's output and to their own in one call, which is not a cross-attention.
        keeps |= len(anatomy.stacks) > 1 and bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        return cls(
            root=root,
            lookup=part.path,
            leave=leave,
            keeps=keeps,
            readers=tuple(_readers(model, root)) if keeps else (),
            room=_room(model, anatomy, root, owner, part.shape[1]),
            placeholder=ordinary(model, part),
            width=part.shape[1],
        )

    def check(self, n: int) -> tuple[str, ...]:
        """What to warn of when n rows are put in front; PlanError S393 when the positions have no room for them."""
        if self.room is None or n == 0:
            return ()
        if n >= self.room:
            raise PlanError.of(
                "S393",
                f"{n} rows in front leave no room for tokens: the model has {self.room} positions",
                help=f"take fewer than {self.room}",
            )
        return (f"sequences may have {self.room - n} tokens at most, {self.room} before ({self.root or 'the model'})",)


def _readers(model: nn.Module, root: str) -> Iterator[str]:
    """The outermost modules beside the encoder that take its output and a mask for it."""

    def below(path: str, module: nn.Module) -> Iterator[str]:
        if path == root:
            return
        names = inspect.signature(module.forward).parameters
        if not within(root, path) and any(n in names for n in STATES):
            yield path
            return
        for name, child in module.named_children():
            yield from below(f"{path}.{name}" if path else name, child)

    return below("", model)


def _room(model: nn.Module, anatomy: Anatomy, root: str, owner: str, width: int) -> int | None:
    """Positions that the learned table beside the lookup has, less the rows that families leave free at its start."""
    # A few vectors that stand for the whole sequence are counted as positions are; a configuration tells them apart.
    settings = getattr(getattr(model, "config", None), "__dict__", {})
    known = {value for name, value in settings.items() if "position" in name and type(value) is int}
    for part in anatomy.parts:
        # Tables of distances stand with the layers, or have a number for each head.
        beside = within(part.path, root) and (owner == root or not within(part.path, owner))
        if part.role == "position" and part.stack is None and beside and part.shape[1] == width:
            table: Any = model.get_submodule(part.path)
            padding = getattr(table, "padding_idx", None)
            room = part.shape[0] - int(getattr(table, "offset", 0 if padding is None else padding + 1))
            if not known or known & {room, part.shape[0]}:
                return room
    return None


def ordinary(model: nn.Module, part: Part) -> int:
    """A token number that neither the table nor the model's configuration gives a meaning of its own."""
    settings = getattr(getattr(model, "config", None), "__dict__", {})
    special = {value for name, value in settings.items() if name.endswith("token_id") and isinstance(value, int)}
    special.add(getattr(model.get_submodule(part.path), "padding_idx", None) or 0)
    half = part.shape[0] // 2
    return next((each for each in (*range(half, part.shape[0]), *range(half)) if each not in special), 0)
