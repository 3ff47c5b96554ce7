"""Wide sums, rounded once into the dtype that holds them, and what that rounding did to a change."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.graph import scratch
from surgery.graph.jit import available
from surgery.graph.matrix import Matrix, Stored


@dataclass(frozen=True)
class Rounding:
    """What rounding did to one tensor's change. changed: entries that the exact sum changes; left: those of them that
    are as they were afterwards, the change being below half a unit in the last place.

    effect, error: Frobenius norms of the exact change, and of what rounding added to it.
    """

    changed: int = 0
    left: int = 0
    effect: float = 0.0
    error: float = 0.0

    @property
    def relative(self) -> float:
        """Error over effect."""
        return self.error / self.effect if self.effect else 0.0

    @property
    def left_alone(self) -> float:
        """The share of the changed entries that rounding left alone."""
        return self.left / self.changed if self.changed else 0.0

    @property
    def drowns(self) -> bool:
        """Whether the change is lost: most of it entry by entry, or all of it in a larger error."""
        return self.left_alone > 0.5 or self.relative > 1

    def __add__(self, other: Rounding) -> Rounding:
        return Rounding(
            self.changed + other.changed,
            self.left + other.left,
            math.hypot(self.effect, other.effect),
            math.hypot(self.error, other.error),
        )


@torch.no_grad()
def measured(exact: Tensor, rounded: Tensor, base: Tensor) -> Rounding:
    """Of one block; exact and base are wide, and exact is overwritten."""
    wide = rounded.to(exact.dtype)
    room = wide - exact
    error = float(torch.linalg.vector_norm(room))
    effect = exact.sub_(base)
    changed, moved = int(effect.count_nonzero()), torch.sub(wide, base, out=room)
    # A difference is zero where two numbers are equal, and counting is faster than comparing.
    left = changed - int((moved if changed == effect.numel() else moved[effect != 0]).count_nonzero())
    return Rounding(changed, left, float(torch.linalg.vector_norm(effect)), error)


def rounded(
    matrix: Matrix, dtype: torch.dtype, turned: bool, base: Matrix | None = None
) -> tuple[Tensor, Rounding | None]:
    """A matrix in a dtype, transposed where it is stored `turned`; and what rounding did to its change against base."""
    rows, columns = matrix.shape
    shape = (columns, rows) if turned else (rows, columns)
    if matrix.device.type == "meta":
        return torch.empty(shape, dtype=dtype, device="meta"), None
    on_cpu = matrix.device.type == "cpu"
    whole = scratch.empty(shape, dtype) if on_cpu else torch.empty(shape, dtype=dtype, device=matrix.device)
    found = Rounding()
    for stretch in matrix.stretches(1 if turned else 0):
        where = (slice(None), stretch) if turned else (stretch, slice(None))
        exact, place = matrix.own(*where), whole[stretch]
        if turned:
            exact = exact.t().contiguous()
        place.copy_(exact)
        if base is not None:
            found += _measured(exact, place, base, where, turned)
    return whole, None if base is None else found


def _measured(exact: Tensor, place: Tensor, base: Matrix, where: tuple[slice, slice], turned: bool) -> Rounding:
    """As `measured`, of one block as it is stored; sooner where numba can be used."""
    if isinstance(base, Stored) and available():
        from surgery.graph.measure import measure, takes

        stored = base.tensor[where].t() if turned else base.tensor[where]
        if takes(exact, place, stored):
            changed, left, effect, error = measure(exact, place, stored)
            return Rounding(changed, left, math.sqrt(effect), math.sqrt(error))
    wide = base.block(*where)
    return measured(exact, place, wide.t() if turned else wide)


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes with one thread in each of ours: blocks are too small to be shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
