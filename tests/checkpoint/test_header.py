"""Only well-formed safetensors are ever opened: every other file is refused from its header, with its code."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from surgery.checkpoint.header import check_checkpoint, checkpoint_files, read_header
from surgery.errors import CheckpointError


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(start: int, stop: int, shape: tuple[Any, ...] = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


BAD = {
    "empty": (b"", "S411"),
    "seven bytes": (b"1234567", "S411"),
    "header cut": (raw({"a": entry(0, 8)}, length=500), "S411"),
    "data cut": (raw({"a": entry(0, 8)}, bytes(7)), "S411"),
    "huge header": (raw({}, length=1 << 60), "S412"),
    "not JSON": (raw(b"{nonsense"), "S412"),
    "not UTF-8": (raw(b"\xff\xfe{}"), "S412"),
    "nested": (raw(b"[" * 100_000), "S412"),
    "a list": (raw([1]), "S412"),
    "name twice": (raw(b'{"a":1,"a":2}'), "S412"),
    "no offsets": (raw({"a": {"dtype": "F32", "shape": [2]}}), "S412"),
    "unknown dtype": (raw({"a": entry(0, 8, dtype="F33")}, bytes(8)), "S412"),
    "negative size": (raw({"a": entry(0, 8, shape=(-2, -1))}, bytes(8)), "S412"),
    "text for a size": (raw({"a": entry(0, 8, shape=("2",))}, bytes(8)), "S412"),
    "wrong length": (raw({"a": entry(0, 4)}, bytes(4)), "S412"),
    "overlap": (raw({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "S412"),
    "hole": (raw({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)), "S412"),
    "starts late": (raw({"a": entry(4, 12)}, bytes(12)), "S412"),
    "trailing bytes": (raw({"a": entry(0, 8)}, bytes(9)), "S412"),
    "metadata not text": (raw({"__metadata__": {"a": 1}}), "S412"),
    "pickle": (pickle.dumps({"a": 1}), "S413"),
    "zip of a pickle": (b"PK\x03\x04" + bytes(100), "S413"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_refused_with_its_code(name: str, tmp_path: Path) -> None:
    content, code = BAD[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert caught.value.diagnostics[0].code == code
    assert str(path) in caught.value.diagnostics[0].message


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_header(tmp_path / "model.safetensors")
    assert caught.value.diagnostics[0].code == "S410"


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    """A download that stopped anywhere is noticed before a tensor is read."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2, dtype=torch.float16)}, path)
    whole = path.read_bytes()
    assert {tensor.name for tensor in read_header(path).tensors} == {"a", "b"}
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_header(path)


def shards(directory: Path, weight_map: dict[str, str]) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "sub/../../x.safetensors", "..", "a\\..\\b.safetensors", "x.json"]
)
def test_index_that_points_outside_is_refused(name: str, tmp_path: Path) -> None:
    inner = tmp_path / "model"
    inner.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "outside.safetensors")
    shards(inner, {"a": name})
    with pytest.raises(CheckpointError) as caught:
        checkpoint_files(inner)
    assert caught.value.diagnostics[0].code == "S414"


def test_symbolic_link_to_outside_is_refused_but_for_the_cache_of_blobs(tmp_path: Path) -> None:
    """The Hugging Face cache keeps snapshots as links into `blobs`: those load, others do not."""
    for parent, target in ((tmp_path / "plain", "elsewhere"), (tmp_path / "snapshots", "blobs")):
        directory = parent / "revision"
        directory.mkdir(parents=True)
        (tmp_path / target).mkdir()
        save_file({"a": torch.ones(1)}, tmp_path / target / "abc")
        (directory / "model.safetensors").symlink_to(tmp_path / target / "abc")
    with pytest.raises(CheckpointError) as caught:
        check_checkpoint(tmp_path / "plain" / "revision")
    assert caught.value.diagnostics[0].code == "S414"
    (header,) = check_checkpoint(tmp_path / "snapshots" / "revision")
    assert header.tensors[0].name == "a"


def test_index_is_held_to_what_the_shards_hold(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    shards(tmp_path, {"a": "one.safetensors", "b": "one.safetensors"})
    with pytest.raises(CheckpointError, match="holds b"):
        check_checkpoint(tmp_path)
    shards(tmp_path, {"a": "one.safetensors"})
    assert len(check_checkpoint(tmp_path)) == 1


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as caught:
        check_checkpoint(tmp_path)
    assert caught.value.diagnostics[0].code == "S413"
    shards(tmp_path, {"a": "pytorch_model.bin"})
    with pytest.raises(CheckpointError) as caught:
        check_checkpoint(tmp_path)
    assert caught.value.diagnostics[0].code == "S413"
