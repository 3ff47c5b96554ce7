"""What numba compiles runs where no folder can be written to, too."""

from __future__ import annotations

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
