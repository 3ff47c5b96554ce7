"""`einsum` of two tensors as the matrix product that it is, so that rules about products see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def shared(left: Tensor, right: Tensor, count: int) -> Tensor:
    """left @ right in one product, where `count` dimensions of the right one before its last two are 1."""
    at = right.dim() - 2 - count
    rows = left.shape[at:-1]
    product = torch.matmul(left.flatten(at, -2), right.flatten(at, -2))
    return product.unflatten(at, rows)  # type: ignore[no-any-return]


def as_product(arguments: Sequence[Any], of_shared: Callable[[Any, Any, int], Any] = shared) -> Any:
    """What `torch.einsum` of some arguments gives, by permutations around one matmul; None where that is not all.

    arguments: an equation such as `bqhd,bkhd->bhqk` and two tensors, or proxies of them. One index is summed over, one
    is the right one's alone, one or more are the left one's (heads, where all of them read the same keys), and all
    others are on both and on the result. The bits are einsum's, which multiplies the same matrices.
    """
    equation, *operands = arguments
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return None
    left, right = operands
    taken, _, given = equation.replace(" ", "").partition("->")
    one, _, other = taken.partition(",")
    if not given or not all(each.isalpha() and len(set(each)) == len(each) for each in (one, other, given)):
        return None
    both = [index for index in given if index in one and index in other]
    summed = [index for index in one if index in other and index not in given]
    rows = [index for index in given if index not in other]
    columns = [index for index in given if index not in one]
    if not rows or len(summed) != 1 or len(columns) != 1:
        return None
    if len(one) != len(both) + len(rows) + 1 or len(other) != len(both) + 2:  # an index that one alone is summed over
        return None
    right = right.permute([other.index(index) for index in (*both, *summed, *columns)])
    for _ in rows[1:]:
        right = right.unsqueeze(len(both))
    left = left.permute([one.index(index) for index in (*both, *rows, *summed)])
    product = of_shared(left, right, len(rows) - 1) if rows[1:] else torch.matmul(left, right)
    order = [*both, *rows, *columns]
    return product if order == list(given) else product.permute([order.index(index) for index in given])


class Products(TorchFunctionMode):
    """Inside, each `einsum` that is a matrix product is computed as one."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.einsum and not kwargs:
            product = as_product(args, lambda left, right, count: torch.matmul(left, right))
            if product is not None:
                return product
        return func(*args, **(kwargs or {}))
