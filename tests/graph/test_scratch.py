"""Memory used again: the same place in the next block, never twice in one, and nothing kept that is too large."""

from __future__ import annotations

import threading
from contextlib import suppress
from itertools import pairwise

import pytest
import torch

from surgery.graph import scratch


@pytest.fixture(autouse=True)
def anew() -> None:
    scratch._OWN.memory = None


def places(*sizes: int, dtype: torch.dtype = torch.float32) -> list[tuple[int, int]]:
    """Where tensors of so many entries lie, as (first byte, the one after the last)."""
    with scratch.reused():
        tensors = [scratch.empty((size,), dtype) for size in sizes]
        for number, tensor in enumerate(tensors):
            tensor.fill_(number)
        assert all(bool((tensor == number).all()) for number, tensor in enumerate(tensors))
        return [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors]


def test_a_later_block_takes_the_same_memory() -> None:
    places(100, 7, 33)
    first, second = places(100, 7, 33), places(100, 7, 33)
    assert first == second
    assert all(begin % scratch.ALIGNED == 0 for begin, _ in first)
    ordered = sorted(first)
    assert all(stop <= begin for (_, stop), (begin, _) in pairwise(ordered))
    inside = places(50)
    assert inside[0][0] == first[0][0]


def test_it_grows_and_gives_back() -> None:
    places(10)
    assert scratch._OWN.memory is not None
    small = scratch._OWN.memory.numel()
    places(10, 1000)
    assert scratch._OWN.memory.numel() >= 4 * 1010 > small
    kept = scratch._OWN.memory.numel()
    with scratch.reused():
        scratch.empty((scratch.MOST + 1,), torch.uint8)
    assert scratch._OWN.memory.numel() == kept


def test_outside_a_block_tensors_are_their_own() -> None:
    places(100)
    kept = scratch._OWN.memory
    assert kept is not None
    tensor = scratch.empty((5, 4), torch.bfloat16)
    assert (tensor.shape, tensor.dtype) == ((5, 4), torch.bfloat16)
    assert not kept.data_ptr() <= tensor.data_ptr() < kept.data_ptr() + kept.numel()


def test_a_number_has_no_dimension() -> None:
    places(100)
    with scratch.reused():
        number = scratch.empty((), torch.float32)
        assert number.fill_(3).item() == 3
        assert number.shape == ()


def test_a_block_that_fails_ends() -> None:
    with suppress(ValueError), scratch.reused():
        scratch.empty((100,), torch.float32)
        raise ValueError
    tensor = scratch.empty((100,), torch.float32)
    assert scratch._OWN.memory is not None
    assert tensor.data_ptr() != scratch._OWN.memory.data_ptr()


def test_threads_have_their_own() -> None:
    places(100)
    mine, theirs = places(100), []

    def work() -> None:
        places(100)
        theirs.extend(places(100))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(theirs) == 1
    assert mine[0][1] <= theirs[0][0] or theirs[0][1] <= mine[0][0]


def test_a_block_inside_a_block_is_part_of_it() -> None:
    places(100, 100)
    with scratch.reused():
        first = scratch.empty((100,), torch.float32)
        with scratch.reused():
            second = scratch.empty((100,), torch.float32)
        third = scratch.empty((100,), torch.float32)
    assert len({first.data_ptr(), second.data_ptr(), third.data_ptr()}) == 3
    assert not scratch._OWN.open


def test_it_is_on_the_cpu_and_writable_in_any_mode() -> None:
    with torch.device("meta"), torch.inference_mode():
        places(100)
    with torch.device("meta"), scratch.reused():
        tensor = scratch.empty((100,), torch.float32)
        other = scratch.empty((100,), torch.float32)
    assert not tensor.is_meta
    assert not other.is_meta
    assert tensor.fill_(1).sum() == 100
