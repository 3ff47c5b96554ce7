"""Our 4-bit encoder against bitsandbytes: the same bytes for whatever a weight may hold."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from surgery.graph.codes import encode

bnb = pytest.importorskip("bitsandbytes.functional")


def hard(shape: tuple[int, int], format: str, block: int) -> Tensor:
    """Weights with empty blocks, values on the bounds between codes and beside them, denormal ones, and no numbers."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(block)) * 0.02
    levels = bnb.get_4bit_type(format, device="cpu").sort().values
    bounds = (levels[1:] + levels[:-1]) / 2
    flat = weight.view(-1)
    flat[:block] = 0
    flat[block : block + 15] = bounds
    flat[block + 15 : block + 30] = torch.nextafter(bounds, torch.ones(15))
    flat[block + 30] = -1.0
    flat[2 * block : 3 * block] = 1e-41
    flat[3 * block + 1], flat[4 * block + 2] = float("inf"), float("nan")
    return weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("block", [32, 64, 256])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_the_bytes_are_bitsandbytes(format: str, block: int, double: bool, dtype: torch.dtype) -> None:
    weight = hard((35, 512), format, block).to(dtype)
    if double:
        weight = weight.nan_to_num(0.0, 1.0)  # a mean of scales has no place for what is no number
    codes, state = encode(weight, format, block, double)
    narrow = weight.float() if dtype == torch.float64 else weight
    wanted, theirs = bnb.quantize_4bit(narrow, blocksize=block, compress_statistics=double, quant_type=format)
    assert len(codes.unique()) > 100
    assert torch.equal(codes, wanted)
    torch.testing.assert_close(state.absmax, theirs.absmax, rtol=0, atol=0, equal_nan=True)
    if double:
        for name in ("absmax", "code"):
            assert torch.equal(getattr(state.state2, name), getattr(theirs.state2, name))
        assert torch.equal(state.offset, theirs.offset)
    again = bnb.dequantize_4bit(codes, state)
    torch.testing.assert_close(again, bnb.dequantize_4bit(wanted, theirs), rtol=0, atol=0, equal_nan=True)


def test_a_last_block_that_is_not_whole_is_left_to_bitsandbytes() -> None:
    weight = torch.randn((7, 9), generator=torch.Generator().manual_seed(0))
    codes, state = encode(weight, "nf4", 64, False)
    wanted, theirs = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(codes, wanted)
    assert torch.equal(state.absmax, theirs.absmax)


def test_the_number_of_threads_stays_what_it_was() -> None:
    """numba starts a pool once in a process, so this takes one of its own."""
    code = """
import torch
from surgery.graph.codes import encode
for threads in (1, 2):
    torch.set_num_threads(threads)
    codes, _ = encode(torch.randn(64, 64), "nf4", 64, False)
    print(codes.numel(), torch.get_num_threads())
"""
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said.split("\n")[:2] == ["2048 1", "2048 2"]
