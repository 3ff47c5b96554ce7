"""A result that is not as required is not written: exit status 1, a table on stderr, and no file left."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import surgery
from surgery.checkpoint.models import load_meta
from surgery.checkpoint.streaming import stream, whole_because
from surgery.errors import PromiseError
from tests import zoo
from tests.checkpoint.test_streaming import both_ways
from tests.cli.conftest import Run

GLOBAL = "prune magnitude 40% global on ffn"
PLAIN = "prune magnitude 3% on ffn ; quantize ffn.up nf4 ; lora rank 2 on attn"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grouped-query attention, tied embeddings, shards."""
    place = tmp_path_factory.mktemp("base") / "qwen2"
    zoo.tiny("qwen2").save_pretrained(place, max_shard_size="20KB")
    return place


@pytest.mark.parametrize(
    ("program", "asked", "found"),
    [
        (f"{PLAIN} ; require trainable < 1%", "trainable < 1%", r"%  FAILS"),
        (f"{PLAIN} ; require zeros <= 3.5% on ffn", "zeros <= 3.5% on ffn", "FAILS"),  # streamed, then counted
        (f"{GLOBAL} ; require zeros > 60% on ffn", "zeros > 60% on ffn", "40%  FAILS"),
        (PLAIN + ' ; require perplexity < 2 using "texts.jsonl"', "perplexity < 2", "FAILS"),
    ],
)
def test_nothing_is_written(program: str, asked: str, found: str, base: Path, run: Run) -> None:
    ids = [zoo.tokens(50, 1, length, seed=length)[0].tolist() for length in (5, 9)]
    Path("texts.jsonl").write_text("".join(json.dumps({"input_ids": each}) + "\n" for each in ids))
    Path("p").write_text(f"{program} ; require size < 1 GB")
    outcome = run("apply", "p", str(base), "-o", "out")
    assert outcome.status == 1
    assert outcome.out == ""
    assert "error[S502]" in outcome.err
    assert outcome.err.count(asked) >= 3, "in the message, the line, and the table"
    assert found in outcome.err
    assert "size < 1 GB" in outcome.err
    assert sorted(os.listdir()) == ["p", "texts.jsonl"]
    Path("p").write_text(program.partition(" ; require")[0])
    assert run("apply", "p", str(base), "-o", "out").status == 0, "it is the requirement that was not met"


def test_zeros_are_counted_as_they_lie_in_the_files(base: Path, tmp_path: Path) -> None:
    """Streamed and live alike; of four bits too, and to the last weight."""
    for name in ("free", "asked"):
        (tmp_path / name).mkdir()
    free, _, why = both_ways(surgery.parse(PLAIN), base, tmp_path / "free")
    assert why is None
    zeros, size = ffn_zeros(tmp_path / "free" / "live")
    assert 0.035 < zeros / size < 0.1, "what is small is zero in four bits"
    asked = f"{PLAIN} ; require zeros == {zeros / size:.17%} on ffn"
    live, streamed, why = both_ways(surgery.parse(asked), base, tmp_path / "asked")
    assert why is None
    assert live == streamed
    assert live.keys() == free.keys()
    shapes = load_meta(str(base))
    plan = surgery.plan(surgery.parse(f"{PLAIN} ; require zeros > {zeros / size:.17%} on ffn"), shapes.model)
    assert whole_because(plan, shapes) is None
    with pytest.raises(PromiseError):
        stream(plan, base, tmp_path / "not", origin=shapes.origin, force=False)
    assert not (tmp_path / "not").exists()
    assert not (tmp_path / ".not.partial").exists()


def ffn_zeros(directory: Path) -> tuple[int, int]:
    """Of the weights as they are used."""
    model: Any = surgery.load(directory)
    zeros = size = 0
    for layer in model.model.layers:
        for module in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            with torch.no_grad():
                weight = module(torch.eye(module.in_features))
            zeros, size = zeros + int((weight == 0).sum()), size + weight.numel()
    return zeros, size


def test_verify_holds_the_files_to_it(base: Path, run: Run) -> None:
    Path("p").write_text(f"{PLAIN} ; require zeros >= 3% on ffn ; require size <= 2 of base")
    assert run("apply", "p", str(base), "-o", "out").status == 0
    verified = run("verify", "out")
    assert verified.status == 0, verified.err
    assert "required" in verified.out
    manifest = json.loads(Path("out/surgery.json").read_text())
    for step in manifest["plan"]["steps"]:
        step["statement"] = step["statement"].replace("require zeros >= 3%", "require zeros >= 99%")
    Path("out/surgery.json").write_text(json.dumps(manifest))
    verified = run("verify", "out")
    assert verified.status == 1
    assert "required fails at model (require zeros >= 99% on ffn): found " in verified.out
    with safe_open("out/surgery.safetensors", "pt") as file:
        assert list(file.keys())
