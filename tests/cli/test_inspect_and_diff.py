"""`surgery inspect` and `surgery diff` on a base, an output, a merged model, and on nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import surgery
from tests import zoo
from tests.cli.conftest import Run


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A base, an output and its merge, in `base`, `out` and `merged`."""
    zoo.tiny("llama").save_pretrained(tmp_path / "base")
    program = "prune magnitude 50% on ffn; lora rank 2 on attn.q,v; quantize attn.o nf4"
    model = surgery.apply(surgery.parse(program), zoo.tiny("llama"))
    surgery.save(model, tmp_path / "out")
    surgery.merge(model).save_pretrained(tmp_path / "merged")
    return tmp_path


def test_inspect_tells_what_was_done(results: Path, run: Run) -> None:
    found = json.loads(run("inspect", str(results / "out"), "--json").out)
    assert found["model"] == "LlamaForCausalLM"
    assert found["version"] == surgery.__version__
    steps = {step["statement"]: step for step in found["steps"]}
    assert steps["prune magnitude 50% on ffn"]["places"] == 9
    assert steps["prune magnitude 50% on ffn"]["zeros"] == pytest.approx(0.5, abs=1e-9)
    assert steps["lora rank 2 on attn.q,v"]["parameters"] > 0
    assert found["promises"] is None
    text = run("inspect", str(results / "out"))
    assert text.status == 0
    assert "50.00% zeros" in text.out
    assert "not verified yet" in text.out
    assert run("verify", str(results / "out")).status == 0
    assert "all kept" in run("inspect", str(results / "out")).out


@pytest.mark.parametrize("changes", [{"plan": {}}, {"plan": {"steps": [1]}}, {"promises": {"findings": 3}}])
def test_inspect_tells_what_it_cannot_read(changes: dict[str, object], results: Path, run: Run) -> None:
    path = results / "out" / "surgery.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    outcome = run("inspect", str(results / "out"))
    assert (outcome.status, outcome.out) == (2, "")
    assert "S440" in outcome.err


def test_inspect_tells_of_an_ordinary_directory(results: Path, run: Run) -> None:
    found = json.loads(run("inspect", str(results / "base"), "--json").out)
    assert "program" not in found
    (file,) = found["files"]
    assert file["elements"] == {"F32": sum(p.numel() for p in zoo.tiny("llama").parameters())}
    assert file["bytes"] == (results / "base" / "model.safetensors").stat().st_size


def test_diff_shows_what_changed_and_nothing_else(results: Path, run: Run) -> None:
    equal = run("diff", str(results / "base"), str(results / "base"))
    assert equal.status == 0
    assert "0 changed, 0 gone, 0 new" in equal.out
    merged = run("diff", str(results / "base"), str(results / "merged"), "--json")
    assert merged.status == 1
    changed = {each["name"] for each in json.loads(merged.out)["tensors"] if each["changed"]}
    assert {name.split(".")[-2] for name in changed} == {"gate_proj", "up_proj", "down_proj", "o_proj"}
    text = run("diff", str(results / "base"), str(results / "merged")).out
    assert "0.0% -> 50." in text or "0.0% -> 49." in text
    assert "q_proj" not in text
    assert "q_proj" in run("diff", str(results / "base"), str(results / "merged"), "--all").out


@pytest.mark.parametrize("command", [["inspect", "nowhere"], ["diff", "demo", "nowhere"]])
def test_what_is_not_there_is_told(command: list[str], run: Run) -> None:
    outcome = run(*command)
    assert outcome.status == 2
    assert "S401" in outcome.err
    assert not outcome.out
