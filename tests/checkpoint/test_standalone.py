"""A result that refers to its base, exported to stand alone, is what `--standalone` would have written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from surgery.checkpoint import sink as sinks
from surgery.checkpoint.header import read_header
from surgery.checkpoint.load import read
from surgery.checkpoint.manifest import Manifest
from surgery.checkpoint.models import load, load_meta
from surgery.checkpoint.source import STRETCH, Source
from surgery.checkpoint.standalone import stream_standalone
from surgery.checkpoint.streaming import stream
from tests import zoo
from tests.checkpoint.test_base import ATTACHED, applied, one_number, refused, saved, weights
from tests.checkpoint.test_save_load import bits, randomised, same_bits
from tests.checkpoint.test_streaming import files
from tests.cli.conftest import Run, run

__all__ = ["run"]

FAMILIES = ("llama", "gpt2", "qwen2", "phi3", "bert", "t5")
PAIRS = [(name, family) for name in ATTACHED if name != "prompt" for family in FAMILIES]
QUICK = [("lora", "llama"), ("prefix", "gpt2"), ("ia3", "t5"), ("train", "bert")]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved("llama", tmp_path / "base")


def nothing_but(*names: str, place: Path) -> None:
    assert sorted(os.listdir(place)) == sorted(names)


def flip(path: Path, place: int) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "family"), [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow) for pair in PAIRS]
)
@pytest.mark.parametrize("shard", ["8KB", "5GB"])
def test_the_bytes_of_a_standalone_apply(name: str, family: str, shard: str, tmp_path: Path) -> None:
    """With ties, with a tokenizer, and beside files that neither copies."""
    base = tmp_path / "base"
    zoo.tiny(family, dtype=torch.bfloat16).save_pretrained(base, max_shard_size=shard)
    zoo.tokenizer(51).save_pretrained(base)
    (base / "modeling_remote.py").write_text("raise SystemExit")
    (base / "README.md").write_text("a model")
    shapes = load_meta(str(base))
    plan = surgery.plan(surgery.parse(ATTACHED[name]), shapes.model)
    for out, standalone in (("out", False), ("whole", True)):
        stream(plan, base, tmp_path / out, origin=shapes.origin, force=False, standalone=standalone)
    surgery.export(tmp_path / "out", tmp_path / "exported", to="standalone")
    exported, whole = files(tmp_path / "exported"), files(tmp_path / "whole")
    assert list(exported) == list(whole)
    assert [file for file in whole if exported[file] != whole[file]] == []
    assert (len(weights(tmp_path / "exported")) > 1) == (shard == "8KB")
    assert weights(tmp_path / "out") == []
    assert "tokenizer.json" in whole
    assert "modeling_remote.py" not in whole
    nothing_but("base", "exported", "out", "whole", place=tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_trained_it_gives_the_same_logits_without_its_base(family: str, tmp_path: Path) -> None:
    """Also where what was added has another dtype than the base, as trainers like it; it trains on."""
    base = saved(family, tmp_path / "base")
    loaded = load(str(base))
    model = surgery.apply(surgery.parse("lora rank 2 on attn + ffn as french; ia3 as second"), loaded.model)
    for parameter in surgery.parameters(model).values():
        parameter.data = parameter.data.float()
    surgery.activate(randomised(model), "french")
    surgery.save(model, tmp_path / "out", origin=loaded.origin)
    assert Manifest.read(tmp_path / "out").base is not None
    surgery.export(str(tmp_path / "out"), str(tmp_path / "exported"), to="standalone")
    before = zoo.logits(model, zoo.inputs(model))
    shutil.rmtree(base)
    shutil.rmtree(tmp_path / "out")
    alone = surgery.load(tmp_path / "exported")
    same_bits(bits(alone), bits(model))
    assert torch.equal(zoo.logits(alone, zoo.inputs(alone)), before)
    with surgery.disabled(alone):
        assert not torch.equal(zoo.logits(alone, zoo.inputs(alone)), before)
    assert surgery.active(alone) == ("french",)
    trained = {name for name, parameter in alone.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad} != set()
    assert surgery.verify(alone)


def test_saved_again_it_needs_no_base(base: Path, tmp_path: Path) -> None:
    """The other way: loaded, and saved as one that stands alone."""
    model = applied("lora rank 2 on all linear", base, tmp_path / "out")
    assert weights(tmp_path / "out") == []
    surgery.save(surgery.load(tmp_path / "out"), tmp_path / "whole", standalone=True)
    surgery.export(surgery.load(tmp_path / "out"), tmp_path / "exported", to="standalone")
    shutil.rmtree(base)
    shutil.rmtree(tmp_path / "out")
    for out in ("whole", "exported"):
        assert Manifest.read(tmp_path / out).base is None
        same_bits(bits(surgery.load(tmp_path / out)), bits(model))
    assert files(tmp_path / "whole") == files(tmp_path / "exported")


def test_on_the_command_line_with_a_base_that_moved(base: Path, tmp_path: Path, run: Run) -> None:
    """What was promised stays promised; other shards of the same tensors will do, and are the measure then."""
    Path("p").write_text("lora rank 2 on all linear")
    assert run("apply", "p", "base", "-o", "out").status == 0
    assert run("verify", "out").status == 0
    load(str(base)).model.save_pretrained("moved")  # type: ignore[operator]
    shutil.rmtree(base)
    lost = run("export", "out", "--to", "standalone", "-o", "whole")
    assert (lost.status, lost.out) == (2, "")
    assert "S447" in lost.err
    nothing_but("moved", "out", "p", place=tmp_path)
    done = run("export", "out", "--to", "standalone", "-o", "whole", "--base", "moved")
    assert (done.status, done.err) == (0, "")
    assert "Saved in whole" in done.out
    shutil.rmtree("moved")
    assert weights(Path("whole")) == ["model.safetensors"]
    assert Manifest.read(Path("whole")).promises == Manifest.read(Path("out")).promises is not None
    assert run("verify", "whole").status == 0
    assert run("merge", "whole", "-o", "merged").status == 0


def test_in_place_of_what_referred(base: Path, tmp_path: Path, run: Run) -> None:
    """What else lies there stays, and weights that are none of its own do not come along."""
    model = applied("lora rank 2 on all linear", base, tmp_path / "out")
    (tmp_path / "out" / "notes").mkdir()
    (tmp_path / "out" / "notes" / "training.txt").write_text("loss 1.2")
    (tmp_path / "out" / "model-00007-of-00009.safetensors").write_bytes(b"of something else")
    (tmp_path / "out" / ".hidden").write_text("")
    assert run("export", "out", "--to", "standalone", "-o", "out").status == 2
    assert run("export", "out", "--to", "standalone", "-o", "out", "--force").status == 0
    assert Path("out/notes/training.txt").read_text() == "loss 1.2"
    assert "model-00007-of-00009.safetensors" not in weights(tmp_path / "out")
    assert not Path("out/.hidden").exists()
    shutil.rmtree(base)
    same_bits(bits(surgery.load("out")), bits(model))
    nothing_but("out", place=tmp_path)


def test_not_inside_of_what_it_is_made_of(base: Path, tmp_path: Path, run: Run) -> None:
    """It would come along with the next one."""
    applied("lora rank 2 on attn", base, tmp_path / "out")
    before = files(tmp_path / "out")
    (tmp_path / "link").symlink_to("out")
    for place in ("out/whole", "link/whole", "out/../out/whole"):
        done = run("export", "out", "--to", "standalone", "-o", place)
        assert (done.status, done.out) == (2, "")
        assert "S431" in done.err
        assert "is inside `out`" in done.err
    assert files(tmp_path / "out") == before
    assert run("export", "out", "--to", "standalone", "-o", "outside").status == 0


@pytest.mark.parametrize("program", ["lora rank 2 on attn", "quantize base nf4 double; lora rank 2 on attn"])
def test_what_stands_alone_already_is_copied(program: str, base: Path, tmp_path: Path, run: Run) -> None:
    applied(program, base, tmp_path / "out", standalone=True)
    assert run("export", "out", "--to", "standalone", "-o", "copy").status == 0
    assert files(tmp_path / "copy") == files(tmp_path / "out")
    header = read_header(tmp_path / "out" / weights(tmp_path / "out")[0])
    info = next(info for info in header.tensors if info.name in Manifest.read(tmp_path / "out").tensors)
    flip(header.path, info.start)
    refused("S412", surgery.export, tmp_path / "out", tmp_path / "never", to="standalone")
    nothing_but("base", "copy", "out", place=tmp_path)


def test_a_base_that_has_changed_is_refused(base: Path, tmp_path: Path) -> None:
    applied("lora rank 2 on all linear", base, tmp_path / "out")
    wide = saved("llama", tmp_path / "wide", intermediate_size=48)
    shallow = saved("llama", tmp_path / "shallow", num_hidden_layers=1)
    name = one_number(base)
    export: Callable[..., Any] = surgery.export
    said = refused("S448", export, tmp_path / "out", tmp_path / "never", to="standalone")
    assert f"the base has changed: {name}" in said
    for other in (wide, shallow):
        refused("S448", export, tmp_path / "out", tmp_path / "never", to="standalone", base=other)
    one_number(base)
    flip(tmp_path / "out" / "surgery.safetensors", -1)
    refused("S412", export, tmp_path / "out", tmp_path / "never", to="standalone")
    nothing_but("base", "out", "shallow", "wide", place=tmp_path)


def test_a_base_is_no_result(base: Path, tmp_path: Path) -> None:
    for place, code in ((base, "S440"), (tmp_path / "nowhere", "S401")):
        refused(code, surgery.export, place, tmp_path / "never", to="standalone")
    refused("S421", surgery.export, zoo.tiny("llama"), tmp_path / "never", to="standalone")
    refused("S453", surgery.export, base, tmp_path / "never", to="alone")
    nothing_but("base", place=tmp_path)


def test_a_directory_is_loaded_for_the_other_forms(base: Path, tmp_path: Path) -> None:
    applied("lora rank 2 on all linear", base, tmp_path / "out")
    loaded = read(tmp_path / "out")
    surgery.export(loaded.model, tmp_path / "one", to="peft", origin=loaded.origin)
    surgery.export(tmp_path / "out", tmp_path / "other", to="peft")
    assert files(tmp_path / "one") == files(tmp_path / "other")
    shutil.move(base, tmp_path / "moved")
    surgery.export(tmp_path / "out", tmp_path / "third", to="peft", base=tmp_path / "moved")
    assert files(tmp_path / "one") == files(tmp_path / "third")


def test_places_that_cannot_be_written(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No permission, and no space: known before anything is written."""
    applied("lora rank 2 on attn", base, tmp_path / "out")
    monkeypatch.setattr(sinks, "write_all", lambda *_: pytest.fail("nothing must be written"))
    export: Callable[..., Any] = surgery.export
    (tmp_path / "locked").mkdir(mode=0o500)
    with monkeypatch.context() as root:
        if os.geteuid() == 0:  # may write everywhere, unless the system says otherwise
            root.setattr(os, "access", lambda *_: False)
        refused("S431", export, tmp_path / "out", tmp_path / "locked" / "whole", to="standalone")
    usage = namedtuple("usage", "total used free")
    size = sum(len(data) for data in files(base).values())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6, size // 2))
    assert "are free" in refused("S433", export, tmp_path / "out", tmp_path / "whole", to="standalone")
    nothing_but("base", "locked", "out", place=tmp_path)


def test_progress_tells_of_every_byte_once(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no tensor is read at once."""
    applied("lora rank 2 on attn", base, tmp_path / "out")
    monkeypatch.setattr(Source, "read", lambda *_: pytest.fail("a whole tensor was read"))
    told: list[int] = []
    stream_standalone(tmp_path / "out", tmp_path / "whole", force=False, tell=told.append)
    monkeypatch.undo()
    assert sum(told) == sum(one.numel() * one.element_size() for one in bits(surgery.load(tmp_path / "whole")).values())
    assert max(told) <= STRETCH


WATCHED = r"""
import re, sys
from pathlib import Path
from surgery.checkpoint.standalone import stream_standalone
def most(): return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1000
stream_standalone(Path("small"), Path("warm"), force=False)
before = most()
stream_standalone(Path("large"), Path("whole"), force=False)
print(most() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell")
def test_memory_is_far_from_the_largest_tensor(tmp_path: Path) -> None:
    """Two tables of 50 MB each pass through; what imports and a small model take has been taken before."""
    for name, vocabulary in (("small", 512), ("large", 1 << 20)):
        base = saved("llama", tmp_path / f"base of {name}", vocab_size=vocabulary, tie_word_embeddings=False)
        shapes = load_meta(str(base))
        plan = surgery.plan(surgery.parse("lora rank 2 on attn"), shapes.model)
        stream(plan, base, tmp_path / name, origin=shapes.origin, force=False)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", WATCHED], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    table = max(path.stat().st_size for path in (tmp_path / "whole").glob("*.safetensors"))
    assert table > 50e6
    assert float(done.stdout) < 16
