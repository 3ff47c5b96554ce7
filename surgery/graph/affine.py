"""Affine maps as values: running a site's code on one gives the site's matrix and offset.

Merging is constant folding: where every operation between a site's input x and its output is affine, the site is
y = M x + c, and M and c come out of the generated code itself when it is called with an `Affine` instead of a tensor.
Whatever is not affine says so by raising `NotAffine`, which is the reason that a site cannot merge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from surgery.graph.matrix import Diagonal, Matrix, Patched, Picked, Product, Scaled, Stored, Sum


class NotAffine(Exception):
    """The value depends on the input in a way that no matrix can say."""


class Affine:
    """x -> matrix @ x + offset over the last dimension.

    matrix: (out, in) in `dtype`, by blocks, or None for a diagonal one on `width` features. offset: (out,) or None for
    zero.
    diagonal: (width,) factors where there is no matrix; None for the identity.
    All products are taken in `dtype` (float32, or float64 for float64 models), so that a merge rounds once, at its end.
    `one_hot`: the value stands for a row of token ids, one-hot encoded; a lookup takes it to the table.
    """

    def __init__(
        self,
        width: int,
        matrix: Matrix | None = None,
        offset: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        one_hot: bool = False,
        device: torch.device | None = None,
        diagonal: Tensor | None = None,
    ) -> None:
        self.width, self.matrix, self.offset, self.dtype, self.one_hot = width, matrix, offset, dtype, one_hot
        self.device = matrix.device if matrix is not None else device
        self.diagonal = diagonal

    @property
    def shape(self) -> torch.Size:
        """As of one batch of one position: code may ask for the number of features, not for the batch."""
        return torch.Size((1, 1, self.width))

    @property
    def whole(self) -> Matrix:
        """The matrix, be it diagonal or not."""
        if self.matrix is not None:
            return self.matrix
        ones = torch.ones(self.width, dtype=self.dtype, device=self.device)
        return Diagonal(ones if self.diagonal is None else self.diagonal)

    def dense(self) -> Tensor:
        """The matrix, written out."""
        return self.whole.dense()

    def then(self, weight: Tensor, bias: Tensor | None = None) -> Affine:
        """The value after y = weight x + bias; weight is (out, in)."""
        if self.one_hot:
            raise NotAffine("token ids go into a linear map")
        stored = Stored(weight.detach(), self.dtype)
        matrix: Matrix = stored
        if self.matrix is not None:
            matrix = Product(stored, self.matrix)
        elif self.diagonal is not None:
            matrix = Scaled(stored, self.diagonal, by_column=True)
        offset = None if self.offset is None else stored.dense() @ self.offset
        if bias is not None:
            bias = bias.detach().to(self.dtype)
            offset = bias if offset is None else offset + bias
        return Affine(weight.shape[0], matrix, offset, self.dtype)

    def _number(self, value: Any) -> Tensor:
        """A constant in this value's dtype; a Python number goes there directly and not by way of float32."""
        return (
            value.detach().to(self.dtype)
            if isinstance(value, Tensor)
            else torch.as_tensor(value, dtype=self.dtype, device=self.device)
        )

    def scaled(self, factor: Any) -> Affine:
        """Times a number, or times a vector over the features."""
        if isinstance(factor, Affine):
            raise NotAffine("the input is multiplied with itself")
        if self.one_hot:
            raise NotAffine("token ids are multiplied")
        factor = self._number(factor)
        if factor.dim() > 1 and factor.numel() != factor.shape[-1]:
            raise NotAffine("the factor differs between positions")
        factor = factor.reshape(-1) if factor.dim() else factor
        offset = None if self.offset is None else self.offset * factor
        if self.matrix is None:
            factors = factor.to(self.device).expand(self.width)
            diagonal = factors if self.diagonal is None else self.diagonal * factors
            return Affine(self.width, None, offset, self.dtype, device=self.device, diagonal=diagonal)
        return Affine(self.width, Scaled(self.matrix, factor), offset, self.dtype)

    def plus(self, other: Any, sign: float = 1.0) -> Affine:
        """Plus another affine value, a vector over the features or a number."""
        if self.one_hot:
            raise NotAffine("token ids are shifted")
        if isinstance(other, Affine):
            offset = self.offset
            if other.offset is not None:
                offset = sign * other.offset if offset is None else offset + sign * other.offset
            return Affine(self.width, Sum(self.whole, other.whole, sign), offset, self.dtype)
        shift = self._number(other)
        if shift.dim() > 1 and shift.numel() != shift.shape[-1]:
            raise NotAffine("the summand differs between positions")
        shift = sign * shift.reshape(-1).expand(self.width)
        offset = shift if self.offset is None else self.offset + shift
        return Affine(self.width, self.matrix, offset, self.dtype, device=self.device, diagonal=self.diagonal)

    def rows(self, index: Tensor) -> Affine:
        """Only these features."""
        offset = None if self.offset is None else self.offset[index]
        return Affine(int(index.numel()), Picked(self.whole, index), offset, self.dtype)

    def at_rows(self, index: Tensor, other: Affine, add: bool) -> Affine:
        """With these features replaced by, or increased by, another value."""
        change = torch.Tensor.index_add if add else torch.Tensor.index_copy
        matrix = Patched(self.whole, index, other.whole, add)
        offset = self.offset
        if offset is not None or other.offset is not None:
            mine = torch.zeros(self.width, dtype=self.dtype, device=matrix.device) if offset is None else offset
            theirs = other.offset if other.offset is not None else torch.zeros_like(mine[index])
            offset = change(mine, 0, index, theirs)
        return Affine(self.width, matrix, offset, self.dtype)

    # What generated code may call on its input besides torch functions.

    def to(self, *_: Any, **__: Any) -> Affine:
        return self

    float = double = half = bfloat16 = type_as = contiguous = to

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __mul__(self, other: Any) -> Affine:
        return self.scaled(other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Affine:
        return self.scaled(1 / self._number(other))

    def __add__(self, other: Any) -> Affine:
        return self.plus(other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Affine:
        return self.plus(other, -1.0)

    def __matmul__(self, other: Tensor) -> Affine:
        return self.then(other.t())

    def __neg__(self) -> Affine:
        return self.scaled(-1.0)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotAffine(f"`.{name}` is not known to be affine")

    def _not_affine(self, other: Any = None) -> NoReturn:
        raise NotAffine("it is compared, raised to a power, or divides")

    __pow__ = __rpow__ = __rtruediv__ = __mod__ = __floordiv__ = _not_affine
    __lt__ = __le__ = __gt__ = __ge__ = _not_affine

    def __getitem__(self, key: Any) -> NoReturn:
        raise NotAffine("some of its entries are picked")

    def __abs__(self) -> NoReturn:
        raise NotAffine("its absolute value is taken")

    def __bool__(self) -> NoReturn:
        raise NotAffine("a decision depends on it")

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Affine:
        name = getattr(func, "__name__", str(func)).strip("_")
        rule = RULES.get(name)
        if rule is None:
            raise NotAffine(f"`{name}` is not affine")
        return rule(*args, **(kwargs or {}))


def _embedding(ids: Any, table: Tensor, *_: Any, **options: Any) -> Affine:
    if not (isinstance(ids, Affine) and ids.one_hot) or options.get("max_norm") is not None:
        raise NotAffine("the lookup renormalises its table, or has no plain token ids")
    return Affine(table.shape[1], Stored(table.detach().t(), ids.dtype), None, ids.dtype)


def _linear(x: Any, weight: Any, bias: Any = None) -> Affine:
    if not isinstance(x, Affine) or isinstance(weight, Affine) or isinstance(bias, Affine):
        raise NotAffine("the weight depends on the input")
    return x.then(weight, bias)


def _matmul(x: Any, weight: Any) -> Affine:
    return _linear(x, weight.t() if isinstance(weight, Tensor) else weight)


def _addmm(bias: Any, x: Any, weight: Any) -> Affine:
    return _linear(x, weight.t() if isinstance(weight, Tensor) else weight, bias)


def _either(method: str) -> Callable[..., Affine]:
    """A commutative operation, whichever operand is the affine one."""

    def rule(a: Any, b: Any, *_: Any, **options: Any) -> Affine:
        if options.get("alpha", 1) != 1:
            raise NotAffine("`alpha` of an addition")
        return getattr(a, method)(b) if isinstance(a, Affine) else getattr(b, method)(a)  # type: ignore[no-any-return]

    return rule


def _subtract(a: Any, b: Any) -> Affine:
    return a.plus(b, -1.0) if isinstance(a, Affine) else b.scaled(-1.0).plus(a)


def _divide(a: Any, b: Any) -> Affine:
    if not isinstance(a, Affine):
        raise NotAffine("division by the input")
    return a.__truediv__(b)


def _same(x: Affine, *_: Any, **__: Any) -> Affine:
    return x


def _indexed(add: bool) -> Callable[..., Affine]:
    def rule(x: Any, dim: int, index: Tensor, other: Any) -> Affine:
        if not (isinstance(x, Affine) and isinstance(other, Affine)) or dim not in (-1, 2):
            raise NotAffine("channels are written across another dimension")
        return x.at_rows(index, other, add)

    return rule


def _select(x: Affine, dim: int, index: Tensor) -> Affine:
    if dim not in (-1, 2):
        raise NotAffine("channels are read across another dimension")
    return x.rows(index)


# torch functions by name; dropout is the identity of a merged model, which is an evaluated one.
RULES: dict[str, Callable[..., Affine]] = {
    "linear": _linear,
    "matmul": _matmul,
    "addmm": _addmm,
    "embedding": _embedding,
    "add": _either("plus"),
    "radd": _either("plus"),
    "mul": _either("scaled"),
    "rmul": _either("scaled"),
    "sub": _subtract,
    "div": _divide,
    "truediv": _divide,
    "dropout": _same,
    "index_add": _indexed(add=True),
    "index_copy": _indexed(add=False),
    "index_select": _select,
}
