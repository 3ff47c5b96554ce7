"""Matrices that are computed a block at a time: none is ever written out but for the block that is asked for.

A merge of a large model passes over every weight once. In blocks that a processor's cache holds, the wide sum, what
rounding does to it and the rounded result cost little more than reading and writing the weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

BLOCK = 1 << 17  # entries: half a megabyte in float32
ALL = slice(None)

Some = slice | Tensor  # of the rows: a stretch, or an index


class Matrix(ABC):
    """(out, in) numbers in a wide dtype, by blocks. A block may be a view of what is stored: not to be written to."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def block(self, rows: Some = ALL, columns: slice = ALL) -> Tensor:
        """Some rows and columns of it."""

    def own(self, rows: Some = ALL, columns: slice = ALL) -> Tensor:
        """As `block`, free to be written to."""
        return self.block(rows, columns)

    def stretches(self, dim: int) -> Iterator[slice]:
        """Whole rows (dim 0) or whole columns (dim 1), as many at a time as a block has room for."""
        step = max(1, BLOCK // max(1, self.shape[1 - dim]))
        for start in range(0, self.shape[dim], step):
            yield slice(start, min(start + step, self.shape[dim]))

    def dense(self) -> Tensor:
        """All of it, computed as its blocks are, so that the bits are the same."""
        whole = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for rows in self.stretches(0):
            whole[rows] = self.block(rows)
        return whole


@dataclass(eq=False)
class Stored(Matrix):
    """A tensor as it lies there, widened as it is read."""

    tensor: Tensor
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self.shape = (self.tensor.shape[0], self.tensor.shape[1])
        self.device = self.tensor.device

    def block(self, rows: Some = ALL, columns: slice = ALL) -> Tensor:
        return self.tensor[rows, columns].to(self.dtype)

    def own(self, rows: Some = ALL, columns: slice = ALL) -> Tensor:
        return self.tensor[rows, columns].to(self.dtype, copy=True)

    def dense(self) -> Tensor:
        return self.tensor.to(self.dtype)


@dataclass(eq=False)
class Diagonal(Matrix):
    """(width,) factors on the diagonal, zeros elsewhere."""

    factors: Tensor

    def __post_init__(self) -> None:
        self.shape = (self.factors.numel(),) * 2
        self.dtype, self.device = self.factors.dtype, self.factors.device

    def block(self, rows: Some = ALL, columns: slice = ALL) -> Tensor:
        places = torch.arange(self.shape[0], device=self.device)
        below, across = places[rows], places[columns]
        return (below.unsqueeze(1) == across) * self.factors[below].unsqueeze(1)


@dataclass(eq=False)
class Product(Matrix):
    """left @ right. The right one is written out: it is the narrow one of a low-rank product."""

    left: Matrix
    right: Matrix

    def __post_init__(self) -> None:
        self.shape = (self.left.shape[0], self.right.shape[1])
        self.dtype, self.device = self.left.dtype, self.left.device

    @cached_property
    def _right(self) -> Tensor:
        return self.right.dense()

    def block(self, rows: Some = ALL, columns: slice = ALL) -> Tensor:
        return self.left.block(rows) @ self._right[:, columns]


@dataclass(eq=False)
class Scaled(Matrix):
    """Times a number or a factor for each row; by_column: for each column."""

    matrix: Matrix
    factor: Tensor
    by_column: bool = False

    def __post_init__(self) -> None:
        self.shape, self.dtype, self.device = self.matrix.shape, self.matrix.dtype, self.matrix.device
        self.factor = self.factor.to(self.device)

    def block(self, rows: Some = ALL, columns: slice = ALL) -> Tensor:
        factor = self.factor
        if factor.dim():
            factor = factor[columns] if self.by_column else factor[rows].unsqueeze(1)
        return self.matrix.own(rows, columns).mul_(factor)


@dataclass(eq=False)
class Sum(Matrix):
    """one + sign * other."""

    one: Matrix
    other: Matrix
    sign: float = 1.0

    def __post_init__(self) -> None:
        self.shape, self.dtype, self.device = self.one.shape, self.one.dtype, self.one.device

    def block(self, rows: Some = ALL, columns: slice = ALL) -> Tensor:
        return self.one.own(rows, columns).add_(self.other.block(rows, columns), alpha=self.sign)


@dataclass(eq=False)
class Picked(Matrix):
    """Some rows of another one."""

    matrix: Matrix
    index: Tensor

    def __post_init__(self) -> None:
        self.shape = (self.index.numel(), self.matrix.shape[1])
        self.dtype, self.device = self.matrix.dtype, self.matrix.device

    def block(self, rows: Some = ALL, columns: slice = ALL) -> Tensor:
        return self.matrix.block(self.index[rows], columns)


@dataclass(eq=False)
class Patched(Matrix):
    """Some rows replaced by another one's, or increased by them. index: those rows, each at most once."""

    matrix: Matrix
    index: Tensor
    other: Matrix
    add: bool

    def __post_init__(self) -> None:
        self.shape, self.dtype, self.device = self.matrix.shape, self.matrix.dtype, self.matrix.device

    @cached_property
    def _row_of_other(self) -> Tensor:
        found = torch.full((self.shape[0],), -1, device=self.device)
        found[self.index] = torch.arange(self.index.numel(), device=self.device)
        return found

    def block(self, rows: Some = ALL, columns: slice = ALL) -> Tensor:
        values, theirs = self.matrix.own(rows, columns), self._row_of_other[rows]
        here = (theirs >= 0).nonzero().squeeze(1)
        if here.numel():
            change = values.index_add_ if self.add else values.index_copy_
            change(0, here, self.other.block(theirs[here], columns))
        return values
