"""What rounding did to a block, in one pass: the counts and norms that torch finds in eight."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from surgery.graph import measure
from surgery.graph.matrix import Stored
from surgery.graph.rounding import Rounding, measured, rounded

SHAPE = (37, 129)  # no multiple of what a processor takes at once
HALVES = [torch.bfloat16, torch.float16]


def block(dtype: torch.dtype, step: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """An exact sum in float32, that sum rounded, and what it changed: half of it by a step, which may be below half a
    unit, half of it not at all; with zeros of both signs, and numbers that are subnormal in half precision."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(SHAPE, generator=generator).to(dtype)
    base[0, :4] = torch.tensor([0.0, -0.0, 1e-7, -3e-8]).to(dtype)
    moved = torch.randn(SHAPE, generator=generator).mul_(step) * (torch.rand(SHAPE, generator=generator) < 0.5)
    exact = base.float() + moved
    return exact, exact.to(dtype), base


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("step", [1.0, 1e-3, 1e-6])
def test_figures_are_those_of_float64(dtype: torch.dtype, step: float) -> None:
    exact, result, base = block(dtype, step)
    assert measure.takes(exact, result, base)
    changed, left, effect, error = measure.measure(exact, result, base)
    wide, new, old = exact.double(), result.double(), base.double()
    moved = wide != old
    assert changed == int(moved.sum())
    assert 0 < changed < exact.numel()
    assert left == int((moved & (new == old)).sum())
    assert left > changed / 2 if step == 1e-6 else left < changed
    assert effect == pytest.approx(float((wide - old).square().sum()), rel=1e-6)
    assert error == pytest.approx(float((new - wide).square().sum()), rel=1e-6)
    by_torch = measured(exact.clone(), result, base.float())
    assert (by_torch.changed, by_torch.left) == (changed, left)
    assert by_torch.error == pytest.approx(math.sqrt(error), rel=1e-5)


@pytest.mark.parametrize("dtype", HALVES)
def test_what_is_no_number_is_seen(dtype: torch.dtype) -> None:
    exact, _result, base = block(dtype, 1e-3)
    exact[3, 5] = math.nan
    _, _, effect, error = measure.measure(exact, exact.to(dtype), base)
    assert math.isnan(effect)
    assert math.isnan(error)
    exact[3, 5] = 1e30
    _, _, effect, error = measure.measure(exact, exact.to(dtype), base)
    assert effect == pytest.approx(1e60)
    assert (error == math.inf) == (dtype == torch.float16)


def test_figures_can_be_written_down_where_numba_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """NUMBA_DISABLE_JIT, for debuggers: the function runs as it is."""
    exact, result, base = block(torch.bfloat16, 1e-3)
    compiled = measure.measure(exact, result, base)
    monkeypatch.setattr(measure, "_measure", measure._measure.py_func)
    found = measure.measure(exact, result, base)
    assert json.loads(json.dumps(found)) == pytest.approx(list(compiled))


def test_other_blocks_are_left_to_torch() -> None:
    exact, result, base = block(torch.bfloat16, 1e-3)
    assert not measure.takes(exact.double(), result, base)
    assert not measure.takes(exact, result.float(), base.float())
    assert not measure.takes(exact, result.half(), base)
    assert not measure.takes(exact, result, base.t().contiguous().t())
    assert not measure.takes(*(each.to("meta") for each in (exact, result, base)))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_a_matrix_of_many_blocks(dtype: torch.dtype, turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways find the same, of a matrix stored either way; the rounded one does not depend on which it is."""
    generator = torch.Generator().manual_seed(1)
    base = torch.randn((300, 1100), generator=generator).to(dtype)
    exact = base.float() + torch.randn((300, 1100), generator=generator) * 1e-3
    stored = base.t().contiguous().t() if turned else base

    def both() -> tuple[Tensor, Rounding]:
        whole, found = rounded(Stored(exact, torch.float32), dtype, turned, Stored(stored, torch.float32))
        assert found is not None
        return whole, found

    calls: list[int] = []
    quick = measure.measure
    monkeypatch.setattr(measure, "measure", lambda *blocks: calls.append(1) or quick(*blocks))
    whole, found = both()
    assert bool(calls) == (dtype != torch.float32)
    monkeypatch.setattr(measure, "takes", lambda *_: False)
    again, by_torch = both()
    assert torch.equal(whole, again)
    assert torch.equal(whole, (exact.t() if turned else exact).to(dtype))
    assert (found.changed, found.left) == (by_torch.changed, by_torch.left)
    assert found.changed > 0.9 * base.numel()
    assert found.effect == pytest.approx(by_torch.effect, rel=1e-5)
    assert found.error == pytest.approx(by_torch.error, rel=1e-5)
