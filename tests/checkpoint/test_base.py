"""A result whose base is untouched has no copy of it: it refers to it by path and digest, and knows another one."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.checkpoint.base import digest_of
from surgery.checkpoint.inspect import inspect
from surgery.checkpoint.manifest import Manifest
from surgery.checkpoint.models import load, load_meta
from surgery.checkpoint.streaming import stream, whole_because
from surgery.errors import CheckpointError
from tests import zoo
from tests.checkpoint.test_save_load import bits, randomised, same_bits
from tests.checkpoint.test_streaming import both_ways, files
from tests.cli.conftest import Run, run

__all__ = ["run"]

ATTACHED = {
    "lora": "lora rank 2 on all linear + embed",
    "dora": "lora rank 2 dora on attn",
    "prefix": "prefix 3 via mlp 4 on all layers",
    "prompt": "prompt 3",
    "ia3": "ia3",
    "adapter": "adapter bottleneck 3 after ffn",
    "train": "train norm; train bias add",
}
CHANGED = {
    "codes": "quantize attn.o nf4; lora rank 2 on attn.q",
    "eight": "quantize attn.o int8; lora rank 2 on attn.q",
    "mask": "prune magnitude 50% on ffn; lora rank 2 on attn.q",
    "pissa": "lora rank 2 init pissa on attn.q",
    "sparse": "sparse static 50% on ffn",
    "drop": "drop layers 1; lora rank 2 on attn.q",
}
QUICK = ("lora", "train", "prompt", "codes", "pissa")
FAMILIES = ("llama", "gpt2", "qwen2", "phi3", "bert", "t5")


def quick(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved("llama", tmp_path / "base")


def saved(family: str, place: Path, **sizes: Any) -> Path:
    zoo.tiny(family, dtype=torch.bfloat16, **sizes).save_pretrained(place, max_shard_size="20KB")
    return place


def applied(program: str, base: Path, out: Path, **options: Any) -> Any:
    """A model that a program has changed and training after it, as it is saved."""
    loaded = load(str(base))
    model = randomised(surgery.apply(surgery.parse(program), loaded.model))
    surgery.save(model, out, origin=loaded.origin, **options)
    return model


def refused(code: str, call: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        call(*arguments, **options)
    assert caught.value.diagnostics[0].code == code
    return str(caught.value)


def weights(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("model*.safetensors*"))


@pytest.mark.parametrize("name", quick(ATTACHED))
def test_what_is_attached_leaves_the_base_where_it_is(name: str, tmp_path: Path) -> None:
    """From a stream as from memory; the directory holds what was added, and with the base it is the model."""
    family = FAMILIES[list(ATTACHED).index(name) % len(FAMILIES)] if name != "prompt" else "gpt2"
    place = saved(family, tmp_path / "base")
    before = zoo.logits(load(str(place)).model, zoo.inputs(zoo.tiny(family)))
    live, streamed, why = both_ways(surgery.parse(ATTACHED[name]), place, tmp_path)
    assert (why is None) == (name != "prompt")
    assert why is not None or live == streamed
    assert weights(tmp_path / "live") == []
    manifest = Manifest.read(tmp_path / "live")
    assert manifest.base is not None
    assert (manifest.base.path, manifest.base.relative) == (str(place), "../base")
    loaded = surgery.load(tmp_path / "live")
    whole = surgery.apply(surgery.parse(ATTACHED[name]), load(str(place)).model)
    same_bits(bits(loaded), bits(whole))
    with surgery.disabled(loaded):
        assert torch.equal(zoo.logits(loaded, zoo.inputs(loaded)), before)
    changed = zoo.logits(randomised(loaded), zoo.inputs(loaded))
    assert changed.shape != before.shape or not torch.equal(changed, before)


@pytest.mark.parametrize("name", quick(CHANGED))
def test_a_base_that_is_changed_is_copied(name: str, base: Path, tmp_path: Path) -> None:
    live, streamed, why = both_ways(surgery.parse(CHANGED[name]), base, tmp_path)
    assert why is not None or live == streamed
    assert weights(tmp_path / "live") != []
    assert Manifest.read(tmp_path / "live").base is None


def test_a_base_that_was_trained_is_copied(base: Path, tmp_path: Path) -> None:
    """The same program: before training it refers to the base, after it does not, for the norms are others."""
    applied("lora rank 2 on attn.q", base, tmp_path / "adapter")
    assert weights(tmp_path / "adapter") == []
    model = applied("train norm", base, tmp_path / "norms")
    assert weights(tmp_path / "norms") != []
    same_bits(bits(surgery.load(tmp_path / "norms")), bits(model))


def test_standalone_copies_the_base_by_both_ways(base: Path, tmp_path: Path) -> None:
    program = surgery.parse("lora rank 2 on attn.q")
    shapes = load_meta(str(base))
    plan = surgery.plan(program, shapes.model)
    assert whole_because(plan, shapes) is None
    stream(plan, base, tmp_path / "stream", origin=shapes.origin, force=False, standalone=True)
    loaded = load(str(base))
    before = zoo.logits(loaded.model, zoo.inputs(loaded.model))
    surgery.save(surgery.apply(program, loaded.model), tmp_path / "live", origin=loaded.origin, standalone=True)
    assert files(tmp_path / "live") == files(tmp_path / "stream")
    assert len(weights(tmp_path / "live")) > 1
    shutil.rmtree(base)
    assert surgery.parameters(surgery.load(tmp_path / "live"))
    theirs = type(loaded.model).from_pretrained(tmp_path / "live")
    assert torch.equal(zoo.logits(theirs, zoo.inputs(theirs)), before)


def test_moved_together_or_pointed_to(base: Path, tmp_path: Path) -> None:
    """By the path, by the relative path, by what is given; in other shards too, for tensors are known by digest."""
    model = applied("lora rank 2 on all linear", base, tmp_path / "out")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(base, tmp_path / "elsewhere" / "base")
    message = refused("S447", surgery.load, tmp_path / "out")
    assert str(base) in message
    assert "--base DIR" in message
    refused("S401", surgery.load, tmp_path / "out", base=tmp_path / "nowhere")
    given = surgery.load(tmp_path / "out", base=tmp_path / "elsewhere" / "base")
    same_bits(bits(given), bits(model))
    shutil.move(tmp_path / "out", tmp_path / "elsewhere" / "out")
    same_bits(bits(surgery.load(tmp_path / "elsewhere" / "out")), bits(model))
    load(str(tmp_path / "elsewhere" / "base")).model.save_pretrained(tmp_path / "one")  # type: ignore[operator]
    assert weights(tmp_path / "one") == ["model.safetensors"]
    same_bits(bits(surgery.load(tmp_path / "elsewhere" / "out", base=tmp_path / "one")), bits(model))
    # What was loaded from where the base is now refers to there.
    surgery.save(given, tmp_path / "again")
    again = Manifest.read(tmp_path / "again").base
    assert again is not None
    assert again.relative == "../elsewhere/base"
    same_bits(bits(surgery.load(tmp_path / "again")), bits(model))
    assert weights(tmp_path / "again") == []


def test_a_model_that_is_given_is_the_base_where_there_is_none(base: Path, tmp_path: Path) -> None:
    model = applied("lora rank 2 on attn.q", base, tmp_path / "out")
    right, other = load(str(base)).model, zoo.tiny("llama", dtype=torch.bfloat16, seed=5)
    shutil.rmtree(base)
    same_bits(bits(surgery.load(tmp_path / "out", right)), bits(model))
    refused("S448", surgery.load, tmp_path / "out", other)


def one_number(base: Path) -> str:
    """Change the last bit of one number of the base."""
    path = sorted(base.glob("*.safetensors"))[-1]
    tensors = load_file(path)
    name = min(name for name in tensors if "proj" in name)
    tensors[name].view(torch.int16).view(-1)[0] ^= 1
    save_file(tensors, path, {"format": "pt"})
    return name


def test_a_base_that_has_changed_is_refused_everywhere(base: Path, tmp_path: Path, run: Run) -> None:
    applied("lora rank 2 on all linear", base, tmp_path / "out")
    digest = digest_of(Manifest.read(tmp_path / "out"))
    before = {entry.digest[:8] for entry in Manifest.read(tmp_path / "out").tensors.values()}
    name = one_number(base)
    message = refused("S448", surgery.load, tmp_path / "out")
    found = message.split("has digest ")[1].split(",")[0]
    assert name in message
    assert message.split("had ")[1].split(" ")[0] in before
    assert found not in before
    for command in (
        ["verify", "out"], ["merge", "out", "-o", "merged"], ["export", "out", "--to", "peft", "-o", "peft"],
        ["report", "out"], ["diff", "base", "out"], ["apply", "p", "out", "-o", "two"],
        ["export", "out", "--to", "standalone", "-o", "alone"],
    ):  # fmt: skip
        Path("p").write_text("ia3")
        outcome = run(*command)
        assert (outcome.status, outcome.out) == (2, ""), command
        assert "S448" in outcome.err, command
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out", "p"]
    assert digest == digest_of(Manifest.read(tmp_path / "out"))


@pytest.mark.parametrize("what", ["dtype", "shape"])
def test_a_base_of_other_numbers_with_the_same_bytes_is_refused(what: str, base: Path, tmp_path: Path) -> None:
    """Digests are of bytes: another dtype or shape in a header makes another model of them."""
    applied("lora rank 2 on all linear", base, tmp_path / "out")
    path = min(base.glob("*.safetensors"))
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = next(name for name in header if "proj" in name)
    rows, columns = header[name]["shape"]
    header[name] |= {"shape": [columns, rows]} if what == "shape" else {"dtype": "F16"}
    path.write_bytes(data[:8] + json.dumps(header, separators=(",", ":")).encode().ljust(length) + data[8 + length :])
    export: Callable[..., Any] = partial(surgery.export, path=tmp_path / "alone", to="standalone")
    for call in (surgery.load, export):
        assert f"{name} has {what}" in refused("S448", call, tmp_path / "out")
    assert f"{name} has {what}" in inspect(tmp_path / "out")["base"]["missing"]
    given = zoo.tiny("llama", dtype=torch.float16)
    shutil.rmtree(base)
    assert "dtype F16" in refused("S448", surgery.load, tmp_path / "out", given)


def test_another_model_is_not_the_base(base: Path, tmp_path: Path) -> None:
    applied("lora rank 2 on all linear", base, tmp_path / "out")
    shallow = saved("llama", tmp_path / "shallow", num_hidden_layers=1)
    assert "it has no model.layers." in refused("S448", surgery.load, tmp_path / "out", base=shallow)
    wide = saved("llama", tmp_path / "wide", intermediate_size=48)
    refused("S448", surgery.load, tmp_path / "out", base=wide)


def test_the_whole_way_on_the_command_line(base: Path, tmp_path: Path, run: Run) -> None:
    """Applied twice, verified, merged, exported, told of; with the base where it was and where it is."""
    Path("p").write_text("lora rank 2 on all linear")
    Path("q").write_text("ia3 as second")
    first = run("apply", "p", "base", "-o", "out")
    assert f"Its base stays in {base}; --standalone copies it." in first.out
    whole = run("apply", "p", "base", "-o", "whole", "--standalone")
    assert "stays in" not in whole.out
    assert weights(tmp_path / "whole")
    shutil.move(base, tmp_path / "moved")
    told = json.loads(run("inspect", "out", "--json").out)
    assert "no longer" in told["base"]["missing"]
    assert "MISSING" in run("inspect", "out").out
    assert run("merge", "out", "-o", "merged").status == 2
    for command in (
        ["apply", "q", "out", "-o", "two", "--base", "moved"],
        ["verify", "two"],
        ["verify", "out", "--base", "moved"],
        ["merge", "out", "-o", "merged", "--base", "moved"],
        ["export", "out", "--to", "peft", "-o", "peft", "--base", "moved"],
        ["export", "out", "--to", "huggingface", "-o", "folded", "--base", "moved"],
        ["report", "out", "--base", "moved"],
    ):
        outcome = run(*command)
        assert (outcome.status, outcome.err) == (0, ""), command
    assert weights(tmp_path / "two") == []
    two = Manifest.read(tmp_path / "two")
    assert two.base is not None
    assert two.base.path == str(tmp_path / "moved")
    assert digest_of(two) == told["base"]["digest"]
    told = json.loads(run("inspect", "out", "--json", "--base", "moved").out)
    assert "missing" not in told["base"]
    assert told["base"]["tensors"] == len(load(str(tmp_path / "moved")).model.state_dict())
    assert weights(tmp_path / "merged") == weights(tmp_path / "moved")
    same = run("diff", "moved", "merged")
    assert same.status == 0  # B starts at zero
    diff = run("diff", "moved", "out", "--base", "moved")
    assert diff.status == 1
    assert "0 changed, 0 gone" in diff.out
    assert run("diff", "out", "whole", "--base", "moved").status == 0


def test_bases_that_will_not_stay_are_copied(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the result replaces, what lies in a place for temporary files, what is itself a result."""
    program = "lora rank 2 on attn.q"
    whole = applied(program, base, tmp_path / "whole", standalone=True)
    surgery.save(surgery.load(tmp_path / "whole"), tmp_path / "second")
    assert weights(tmp_path / "second")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    shutil.copytree(base, tmp_path / "temporary" / "base")
    applied(program, tmp_path / "temporary" / "base", tmp_path / "out")
    assert weights(tmp_path / "out")
    applied(program, tmp_path / "temporary" / "base", tmp_path / "temporary" / "out")
    assert weights(tmp_path / "temporary" / "out") == []
    applied(program, base, base, force=True)
    assert weights(base)
    for out in (tmp_path / "second", tmp_path / "out", tmp_path / "temporary" / "out", base):
        same_bits(bits(surgery.load(out)), bits(whole))


def test_the_demonstration_model_is_found_by_its_name(tmp_path: Path, run: Run) -> None:
    Path("p").write_text("lora rank 2 on attn.q in layers 0")
    assert run("apply", "p", "demo", "-o", "out").status == 0
    assert json.loads(Path("out/surgery.json").read_text())["base"] == {"path": "demo", "relative": None}
    assert weights(tmp_path / "out") == []
    assert surgery.parameters(surgery.load("out"))


@pytest.mark.parametrize(
    "base",
    [None, 3, [], "base", {"path": 3}, {"path": "/", "more": 1}, {"path": "x", "relative": 2}, {"relative": "x"}],
)
def test_a_manifest_with_a_strange_base_is_refused(base: Any, tmp_path: Path) -> None:
    applied("lora rank 2 on attn.q", saved("llama", tmp_path / "base"), tmp_path / "out")
    data = json.loads((tmp_path / "out" / "surgery.json").read_text())
    (tmp_path / "out" / "surgery.json").write_text(json.dumps({**data, "base": base}))
    refused("S440", surgery.load, tmp_path / "out")


def test_a_base_in_a_place_that_the_system_refuses_is_not_there(tmp_path: Path) -> None:
    applied("lora rank 2 on attn.q", saved("llama", tmp_path / "base"), tmp_path / "out")
    data = json.loads((tmp_path / "out" / "surgery.json").read_text())
    (tmp_path / "out" / "surgery.json").write_text(json.dumps({**data, "base": {"path": "x" * 5000}}))
    refused("S447", surgery.load, tmp_path / "out")
