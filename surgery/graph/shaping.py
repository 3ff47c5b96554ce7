"""What statements that reshape a model work with: the model as it is by now, and what its configuration has to say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from surgery.anatomy.parts import Anatomy, Stack
from surgery.anatomy.paths import moved, within


@dataclass(frozen=True)
class Change:
    """A number of the configuration that was `was` is `now`; a list of so many entries has `kept` of them, in order."""

    was: float
    now: float
    kept: tuple[int, ...] | None = None


@dataclass
class Shaping:
    """The model that is reshaped, live or on the meta device, and the anatomy that it was given with.

    hollow: only shapes matter, nothing is computed. changes: what a configuration must say to give the new shapes.
    beyond: why none can, where so. inputs: what a plain torch module is called with. last: to be done when the whole
    model has its shape, see `at_the_end`. layers: of stacks by name, which layers of the given model stand there now.
    moved: paths of modules of the given model that stand inside of another one now, and where.
    """

    model: nn.Module
    anatomy: Anatomy
    seed: int = 0
    tokenizer: Any = None
    hollow: bool = False
    changes: list[Change] = field(default_factory=list)
    beyond: list[str] = field(default_factory=list)
    inputs: tuple[Any, ...] | Mapping[str, Any] | None = None
    layers: dict[str, list[int]] = field(default_factory=dict)
    last: list[Callable[[Shaping], object]] = field(default_factory=list)
    moved: dict[str, str] = field(default_factory=dict)

    def resized(self, was: float, now: float, kept: Sequence[int] | None = None) -> None:
        """Tell that some number of the configuration has changed."""
        change = Change(was, now, None if kept is None else tuple(kept))
        if change not in self.changes:
            self.changes.append(change)

    def order(self, stack: Stack) -> list[int]:
        """The layers of a stack as they stand now, by their index in the given model."""
        return self.layers.setdefault(stack.name, list(range(stack.depth)))

    def standing(self, path: str) -> str:
        """Where a module of the given model stands now, its layers counted as they were."""
        for before, now in self.moved.items():
            if within(path, before):
                return moved(path, before, now)
        return path

    def beyond_configuration(self, reason: str) -> None:
        """Tell that no configuration can say what has changed."""
        self.beyond.append(reason)

    def at_the_end(self, action: Callable[[Shaping], object]) -> None:
        """Something that needs the reshaped model to run; not done on shapes alone."""
        self.last.append(action)
