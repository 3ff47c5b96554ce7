"""Directories of earlier formats are read as they were written: what they lack, and the digests that they have."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import surgery
from surgery.checkpoint.compare import compare
from surgery.checkpoint.manifest import FORMAT, NAME
from surgery.checkpoint.merging import merged_shapes, stream_merge
from surgery.checkpoint.tensors import NAMES
from surgery.errors import CheckpointError
from surgery.graph.digest import bytes_of, digest
from tests import zoo

PROGRAM = "lora rank 2 on attn; quantize ffn nf4"


def made_former(directory: Path, format: int, base: Path) -> None:
    """The manifest as an earlier version wrote it: BLAKE2b of every tensor, and no dtype or shape; the first one has no
    word of a base."""
    data = json.loads((directory / NAME).read_text())
    assert data["format"] == FORMAT == 3
    data["format"] = format
    if format == 1:
        assert data.pop("base") is None
    for name, entry in data["tensors"].items():
        files = base.glob("*.safetensors") if entry["file"] == "base" else [directory / entry["file"]]
        for file in files:
            with safe_open(file, "pt") as opened:
                if (key := entry.get("key", name)) in opened.keys():  # noqa: SIM118
                    tensor = opened.get_tensor(key)
        assert entry["digest"] == digest(tensor)
        entry["digest"] = hashlib.blake2b(bytes_of(tensor), digest_size=16).hexdigest()
        assert (entry.pop("dtype"), entry.pop("shape")) == (NAMES[tensor.dtype], list(tensor.shape))
    (directory / NAME).write_text(json.dumps(data))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    zoo.tiny("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def damage(file: Path) -> None:
    """Another last byte."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("format", [1, 2])
def test_a_former_directory_is_loaded_checked_and_merged(format: int, base: Path, tmp_path: Path) -> None:
    out, model = tmp_path / "out", surgery.apply(surgery.parse(PROGRAM), zoo.tiny("llama"))
    for parameter in surgery.parameters(model).values():
        parameter.data.add_(0.01)
    fed = zoo.inputs(model)
    surgery.save(model, out, standalone=True)
    before = (out / NAME).read_text()
    made_former(out, format, base)
    assert (out / NAME).read_text() != before
    loaded = surgery.load(out)
    assert torch.equal(zoo.logits(loaded, fed), zoo.logits(model, fed))
    assert surgery.verify(loaded)
    surgery.save(loaded, tmp_path / "again", standalone=True)
    assert json.loads((tmp_path / "again" / NAME).read_text())["tensors"] == json.loads(before)["tensors"]
    damage(out / "surgery.safetensors")
    with pytest.raises(CheckpointError) as caught:
        surgery.load(out)
    assert caught.value.diagnostics[0].code == "S412"


def test_a_former_directory_that_refers_to_its_base(base: Path, tmp_path: Path) -> None:
    """Loaded, compared, merged by streaming and completed, each with the digests that it has; another base is seen."""
    out = tmp_path / "out"
    model = surgery.apply(surgery.parse("lora rank 2 on attn"), zoo.tiny("llama"))
    surgery.save(model, out, origin=str(base))
    assert not list(out.glob("model*.safetensors"))
    surgery.export(out, tmp_path / "new", to="standalone")
    made_former(out, 2, base)
    assert torch.equal(zoo.logits(surgery.load(out), zoo.inputs(model)), zoo.logits(model, zoo.inputs(model)))
    assert all(one.same for one in compare(out, out))
    shapes = merged_shapes(out)
    assert shapes is not None
    stream_merge(out, shapes, tmp_path / "merged", force=False)
    assert (tmp_path / "merged/model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    surgery.export(out, tmp_path / "whole", to="standalone")
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "new/model.safetensors").read_bytes()
    assert torch.equal(
        zoo.logits(surgery.load(tmp_path / "whole"), zoo.inputs(model)), zoo.logits(model, zoo.inputs(model))
    )
    damage(base / "model.safetensors")
    for use in (
        lambda: surgery.load(out),
        lambda: list(compare(out, out)),
        lambda: surgery.export(out, tmp_path / "other", to="standalone"),
    ):
        with pytest.raises(CheckpointError) as caught:
            use()
        assert caught.value.diagnostics[0].code == "S448"


def test_what_only_later_formats_can_say(tmp_path: Path) -> None:
    out = tmp_path / "out"
    surgery.save(surgery.apply(surgery.parse(PROGRAM), zoo.tiny("llama")), out, standalone=True)
    data = json.loads((out / NAME).read_text())
    del data["base"]
    (out / NAME).write_text(json.dumps({**data, "format": 1, "tensors": {"x": {"file": "base", "digest": "0"}}}))
    with pytest.raises(CheckpointError) as caught:
        surgery.load(out)
    assert caught.value.diagnostics[0].code == "S440"
