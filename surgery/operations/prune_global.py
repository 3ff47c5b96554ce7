"""Weights of many matrices ranked together, one matrix at a time: histograms find the score up to which they go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from surgery.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

DIGIT = 16  # bits of a score that one histogram tells apart


def kept_of_all(scores: Callable[[], Iterable[Tensor]], share: float, dtype: torch.dtype) -> Iterator[Tensor]:
    """True for all but the round(share * count) smallest of all scores together, tensor by tensor.

    Of equal ones those that come first go. scores: gives the same tensors every time it is called, which is three times
    for float32; for float64, which has more digits, five times. dtype: either, in which they are compared. In memory
    are one tensor, what it becomes, and a histogram of 65,536 numbers.
    """
    threshold, equal = _smallest(scores, share, dtype)
    for score in scores():
        order = _ordered(score, dtype)
        keep = order > threshold
        ties = (order == threshold).flatten().nonzero().flatten()
        keep.view(-1)[ties[equal:]] = True
        equal -= min(equal, len(ties))
        yield keep


def _smallest(scores: Callable[[], Iterable[Tensor]], share: float, dtype: torch.dtype) -> tuple[int, int]:
    """The largest of the scores that go, in their order as integers, and how many of those that equal it."""
    bits = torch.finfo(dtype).bits
    low, values = 2 ** (DIGIT - 1), 2**DIGIT
    histogram = torch.zeros(values, dtype=torch.int64)
    for score in scores():
        histogram += torch.bincount((_ordered(score, dtype) >> bits - DIGIT).flatten() + low, minlength=values).cpu()
    going = round(share * int(histogram.sum()))
    if not going:
        return -(2 ** (bits - 1)), 0
    digit, going = _at(histogram, going)
    prefix = digit - low  # the first digit has the sign
    for shift in range(bits - 2 * DIGIT, -1, -DIGIT):
        histogram.zero_()
        for score in scores():
            digits = (_ordered(score, dtype) >> shift).flatten()
            digits = digits[digits >> DIGIT == prefix] & values - 1
            histogram += torch.bincount(digits, minlength=values).cpu()
        digit, going = _at(histogram, going)
        prefix = (prefix << DIGIT) + digit
    return prefix, going


def _at(histogram: Tensor, rank: int) -> tuple[int, int]:
    """The bin of the number of that rank, from 1, and its rank inside."""
    up_to = histogram.cumsum(0)
    found = int(torch.searchsorted(up_to, rank))
    return found, rank - int(up_to[found] - histogram[found])


def _ordered(score: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers in the order of the scores: bits of floating point numbers, those of negative ones turned over."""
    integer = torch.int32 if dtype == torch.float32 else torch.int64
    bits = score.to(dtype).contiguous().view(integer)
    return bits ^ ((bits >> torch.iinfo(integer).bits - 1) & torch.iinfo(integer).max)


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """In which the scores of weights of these dtypes are compared."""
    return torch.float64 if torch.float64 in dtypes else torch.float32
