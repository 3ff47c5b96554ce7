"""What numba compiles runs where no folder can be written to, too; where it cannot be imported, torch does the work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba.core.caching
import numpy as np
import pytest

from surgery.graph.jit import jit


def total(values: Any) -> float:
    found = 0.0
    for value in values:
        found += value
    return found


def test_without_a_folder_for_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.core.caching.CacheImpl, "_locator_classes", [])
    with pytest.raises(RuntimeError, match="no locator"):
        numba.njit(cache=True)(total)
    assert jit(nogil=True)(total)(np.arange(4.0)) == 6


WITHOUT = """
import torch
from surgery.graph.codes import encode
from surgery.graph.matrix import Stored
from surgery.graph.rounding import rounded

base = torch.ones(2, 3).bfloat16()
_, found = rounded(Stored(base.float() + 1, torch.float32), torch.bfloat16, False, Stored(base, torch.float32))
print(found.changed, encode(torch.ones(8, 64), "nf4", 64, False)[0].numel())
"""


def test_one_that_does_not_fit_its_numpy_is_left_out(tmp_path: Path) -> None:
    """It is found, and raises when it is imported."""
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text('raise ImportError("Numba needs another NumPy")')
    places = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], env={**os.environ, "PYTHONPATH": places}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "6 256\n"), done.stderr
