"""What is written is what is read, to the bit, by us and by the safetensors library."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from surgery.checkpoint import tensors as files
from surgery.checkpoint.header import read_header
from surgery.graph.digest import digest


def some() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(4, 6, generator=generator)
    return {
        "f64": wide.double(),
        "f32": wide,
        "f16": wide.half(),
        "bf16": wide.bfloat16(),
        "u8": torch.arange(7, dtype=torch.uint8),
        "i64": torch.arange(3),
        "bool": wide > 0,
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
        "transposed": wide.t(),
        "strided": wide[:, ::2],
    }


def test_round_trip_by_us_and_by_safetensors(tmp_path: Path) -> None:
    path, tensors = tmp_path / "x.safetensors", some()
    told: list[int] = []
    digests = files.write(path, tensors, told.append)
    assert sum(told) == sum(t.numel() * t.itemsize for t in tensors.values())
    theirs, ours = load_file(path), dict(files.read(read_header(path)))
    assert set(theirs) == set(ours) == set(tensors)
    for name, tensor in tensors.items():
        for read in (theirs[name], ours[name]):
            assert read.dtype == tensor.dtype
            assert torch.equal(read, tensor)
        assert digests[name] == digest(ours[name])


def test_digest_sees_every_bit() -> None:
    tensor = torch.zeros(9)
    changed = tensor.clone()
    changed[8] = -0.0  # equal as a number, not as bits
    assert digest(tensor) != digest(changed)


def test_dtype_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(files.CheckpointError, match="complex128"):
        files.write(tmp_path / "x", {"z": torch.zeros(1, dtype=torch.complex128)})
    assert not (tmp_path / "x").exists()
