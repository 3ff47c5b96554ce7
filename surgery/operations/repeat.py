"""Depth up-scaling: layers stand twice (Kim et al. 2023); silent copies change nothing at first (Wu et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

from surgery.lazy import lazy
from surgery.operations.base import Flag, flag
from surgery.operations.layers import OfLayers

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from surgery.anatomy.parts import Part
    from surgery.graph import depth
    from surgery.graph.shaping import Shaping
else:
    depth = lazy("surgery.graph.depth")

WRITERS = ("attn.o", "cross.o", "ffn.down", "mixer.out")


@dataclass(frozen=True, kw_only=True)
class Repeat(OfLayers):
    """Let layers stand twice: `repeat layers 8..15` puts copies of 8 to 15 behind 15, with weights of their own.

    Layers with gaps between them are repeated run by run, so that `repeat layers even` puts each copy right behind its
    layer. `silent`: the maps by which the copies write into the residual stream start at zero, so that the model is
    unchanged until they are trained. All statements that do not reshape the model speak of the layers as they are then.
    """

    verb: ClassVar[str] = "repeat"
    sign: ClassVar[str] = "+"

    silent: Flag = flag("the copies' output maps start at zero: the model is unchanged at first")

    def fits(self, part: Part) -> str | None:
        if self.silent and part.rescales:
            return "what it hands on is more than the sum of what it reads and what it adds, so no copy can be silent"
        return None

    def reshape(self, parts: Sequence[Part], shaping: Shaping) -> None:
        for stack in shaping.anatomy.stacks:
            layers = {part.layer for part in parts if part.stack == stack.name}
            if not layers:
                continue
            standing = shaping.order(stack)
            order = list(range(len(standing)))
            for run in reversed(list(_runs([place for place in order if standing[place] in layers]))):
                order[run[-1] + 1 : run[-1] + 1] = run
            copies = depth.reorder(shaping, stack, order)
            if self.silent:
                for place, path in copies.items():
                    self._silence(shaping, stack.name, shaping.order(stack)[place], path)
                shaping.at_the_end(partial(depth.check_silent, list(copies.values())))

    def _silence(self, shaping: Shaping, stack: str, layer: int, copy: str) -> None:
        """Zero the rows that a copy writes with, and their biases."""
        here = [part for part in shaping.anatomy.parts if (part.stack, part.layer) == (stack, layer)]
        (original,) = (part.path for part in here if part.role == "layer")
        for part in here:
            if part.role in WRITERS:
                module = shaping.model.get_submodule(copy + shaping.standing(part.path)[len(original) :])
                depth.zero_rows(module, part)


def _runs(layers: Sequence[int]) -> Iterator[list[int]]:
    """Neighbours together."""
    run = [layers[0]]
    for one, other in pairwise(layers):
        if other != one + 1:
            yield run
            run = []
        run.append(other)
    yield run
