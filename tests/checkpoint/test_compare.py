"""Directories compared tensor by tensor: what is counted, and that stretches change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from surgery.checkpoint import compare
from surgery.checkpoint.tensors import write


def directory(path: Path, tensors: dict[str, Tensor]) -> Path:
    path.mkdir()
    write(path / "model.safetensors", tensors)
    return path


@pytest.fixture
def both(tmp_path: Path) -> tuple[Path, Path]:
    made = torch.Generator().manual_seed(0)
    weight = torch.randn(13, 7, generator=made)
    lost = weight.clone()
    lost[0, 0] = float("nan")
    pruned = weight.clone()
    pruned.view(-1)[::3] = 0
    before = {
        "same": weight,
        "lost": lost,
        "pruned": weight,
        "rounded": weight,
        "codes": torch.arange(40, dtype=torch.uint8),
        "shape": weight,
        "gone": weight,
        "scalar": torch.tensor(3),
    }
    after = {
        "same": weight,
        "lost": lost,
        "pruned": pruned,
        "rounded": weight.bfloat16(),
        "codes": torch.arange(40, dtype=torch.uint8) // 2 * 2,
        "shape": weight.t().contiguous(),
        "new": weight,
        "scalar": torch.tensor(3),
    }
    return directory(tmp_path / "a", before), directory(tmp_path / "b", after)


@pytest.mark.parametrize("stretch", [4, 17, 2**22])
def test_every_tensor_is_told_apart(both: tuple[Path, Path], stretch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "STRETCH", stretch)
    told: list[int] = []
    found = {each.name: each for each in compare.compare(*both, tell=told.append)}
    assert sum(told) == sum(map(compare.bytes_of, both))
    assert {name for name, each in found.items() if each.same} == {"same", "lost", "scalar"}
    assert (found["gone"].after, found["new"].before, found["shape"].error) == (None, None, None)
    pruned = found["pruned"]
    assert pruned.changed == pytest.approx(31 / 91)
    assert pruned.zeros == pytest.approx((0, 31 / 91))
    weight = torch.randn(13, 7, generator=torch.Generator().manual_seed(0)).double().view(-1)
    assert pruned.error == pytest.approx(float(weight[::3].norm() / weight.norm()))
    assert pruned.largest == pytest.approx(float(weight[::3].abs().max()))
    assert found["rounded"].before == "F32 13 x 7"
    assert found["rounded"].after == "BF16 13 x 7"
    assert 0 < (found["rounded"].error or 0) < 2**-8
    assert found["codes"].changed == 0.5
    assert found["codes"].error is None
    assert compare.summary(list(found.values())) == {"same": 3, "changed": 4, "gone": 1, "new": 1}
