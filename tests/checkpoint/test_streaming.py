"""A directory that is streamed gives the very bytes of the model that was loaded, transformed and saved."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import surgery
from surgery.checkpoint.inventory import inventory
from surgery.checkpoint.merging import merged_shapes, stream_merge
from surgery.checkpoint.models import load, load_meta
from surgery.checkpoint.streaming import stream, whole_because
from surgery.graph.blank import Lender
from surgery.language import load_program
from tests import zoo

SPECS = sorted((Path(__file__).parents[2] / "specs").glob("*.surgery"))
PROGRAMS = {
    "quantized": "quantize base nf4 double",
    "several": "quantize ffn fp4 block 128; lora rank 2 dora on attn",
    "pruned": "prune magnitude 50% on ffn; prune random 25% rows on attn.o",
    "ranked": "prune magnitude 40% global on ffn + attn.o; prune random 30% global on attn.q; lora rank 2 dora on ffn",
    "attached": "lora rank 2 on all linear; prefix 3 gated on all layers as front",
    "many": "prune random 30% on ffn; quantize attn.o nf4; lora rank 2 init pissa on attn.o; ia3; train norm",
    "adapters": "adapter bottleneck 3 after ffn; quantize base nf4",
    "lookups": "lora rank 2 on embed; train bias add",
    "shared": "prefix 5 via mlp 4 on all layers",
    "front": "ptuning v1 5 via mlp 6",
    "eight": "quantize base int8; prune magnitude 50% on ffn; lora rank 2 dora on attn",
}


# Specs with a statement that needs all of a model, or a model whose library stores other tensors than it computes with.
WHOLE = {
    "calibrated", "deeper", "depth", "experts", "instruct", "narrower", "prompt", "shots", "structured", "upcycled",
}  # fmt: skip


def files(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in sorted(os.listdir(directory))}


def both_ways(
    program: Any, source: Path, place: Path, tokenizer: Any = None
) -> tuple[dict[str, bytes], dict[str, bytes], str | None]:
    """What is in the directory of the live path, in that of the stream, and why there is none."""
    loaded = load(str(source))
    surgery.save(surgery.apply(program, loaded.model, tokenizer=tokenizer), place / "live", origin=loaded.origin)
    shapes = load_meta(str(source))
    plan = surgery.plan(program, shapes.model, tokenizer=tokenizer)
    why = whole_because(plan, shapes)
    if why is None:
        stream(plan, source, place / "stream", origin=shapes.origin, force=False)
        return files(place / "live"), files(place / "stream"), None
    return files(place / "live"), {}, why


FAMILIES = ("llama", "gpt2", "qwen2", "phi3", "bert", "t5")
PAIRS = [(name, family) for name in PROGRAMS for family in FAMILIES]
QUICK = [(name, FAMILIES[index % len(FAMILIES)]) for index, name in enumerate(PROGRAMS)]


@pytest.mark.parametrize(
    ("name", "family"), [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow) for pair in PAIRS]
)
def test_same_bytes_for_every_family(name: str, family: str, tmp_path: Path) -> None:
    dtype = torch.bfloat16 if family in ("llama", "gpt2") else torch.float32
    zoo.tiny(family, dtype=dtype).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    live, streamed, why = both_ways(surgery.parse(PROGRAMS[name]), tmp_path / "base", tmp_path)
    assert why is None
    assert list(live) == list(streamed)
    assert [file for file in live if live[file] != streamed[file]] == []
    assert len(json.loads(live["surgery.json"])["tensors"]) > 20
    assert sorted(os.listdir(tmp_path)) == ["base", "live", "stream"]


@pytest.mark.slow
@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_every_spec(path: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 224, "intermediate_size": 336, "head_dim": 56, "num_hidden_layers": 16}
    if path.stem == "experts":
        model = zoo.tiny("mixtral", **{**sizes, "num_hidden_layers": 2})
    else:
        model = zoo.tiny("llama", **sizes)
    model.save_pretrained(tmp_path / "base")
    tokenizer = zoo.tokenizer(61)
    live, streamed, why = both_ways(load_program(path), tmp_path / "base", tmp_path, tokenizer)
    assert (why is not None) == (path.stem in WHOLE), why
    if path.stem == "optimize":  # made on shapes alone, a plan also tells what the optimizer would be on CUDA
        live, streamed = without_notes(live), without_notes(streamed)
    assert why is not None or list(live) == list(streamed)
    assert [file for file in streamed if live[file] != streamed[file]] == []
    assert (why is None) == bool(streamed)


def without_notes(found: dict[str, bytes]) -> dict[str, bytes]:
    said = json.loads(found["surgery.json"])
    assert said["plan"].pop("notes")
    return {**found, "surgery.json": json.dumps(said).encode()}


def test_what_cannot_be_streamed_says_why(tmp_path: Path) -> None:
    zoo.tiny("mixtral").save_pretrained(tmp_path / "experts")
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"input_ids": [1, 2, 3]}')
    model = zoo.tiny("llama")
    model.save_pretrained(tmp_path / "base")
    model.double().save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "config.json").write_bytes((tmp_path / "base" / "config.json").read_bytes())
    reasons = {}
    for name, text in (
        ("experts", "train norm"),
        ("base", f'prune sensitivity 50% using "{texts}" on ffn'),
        ("base", "prompt 3 init vocab"),
        ("other", "train norm"),
    ):
        shapes = load_meta(str(tmp_path / name))
        reasons[f"{name}: {text}"] = whole_because(surgery.plan(surgery.parse(text), shapes.model), shapes)
    assert all(reasons.values())
    assert len(set(reasons.values())) == 4


def test_a_global_threshold_has_one_matrix_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two histograms and the masks: each matrix is read three times, one after the other."""
    zoo.tiny("llama").save_pretrained(tmp_path / "base")
    program = surgery.parse("prune magnitude 45% global on ffn")
    shapes = load_meta(str(tmp_path / "base"))
    plan = surgery.plan(program, shapes.model)
    lent, most = [], []
    lend = Lender._lend

    def watched(self: Lender, path: str, names: tuple[str, ...]) -> None:
        lend(self, path, names)
        lent.append(path)
        most.append(len(self.running))

    monkeypatch.setattr(Lender, "_lend", watched)
    stream(plan, tmp_path / "base", tmp_path / "out", origin=str(tmp_path / "base"), force=False)
    (step,) = plan.steps
    assert lent == 3 * [part.path for part in step.parts]
    assert max(most) == 1
    weights = [surgery.load(tmp_path / "out").get_submodule(part.path).weight for part in step.parts]
    count = sum(weight.numel() for weight in weights)
    assert sum(int((weight == 0).sum()) for weight in weights) == round(0.45 * count)
    assert len({int((weight == 0).sum()) for weight in weights}) > 3, "of each as many as its weights deserve"


@pytest.mark.parametrize(
    ("family", "amount"), [("llama", "50%"), ("gpt2", "50%"), pytest.param("bert", "30%", marks=pytest.mark.slow)]
)
def test_wanda_has_one_layer_in_memory(
    family: str, amount: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last layer's masks too come of what the pruned layers before have made of the texts."""
    zoo.tiny(family).save_pretrained(tmp_path / "base")
    ids = [zoo.tokens(50, 1, 9, seed)[0].tolist() for seed in range(3)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"input_ids": each}) + "\n" for each in ids))
    using = f'using "{tmp_path / "texts.jsonl"}"'
    program = surgery.parse(f"prune wanda {amount} {using} on ffn + attn.o; quantize attn.o nf4; lora rank 2 on ffn")
    most, lend = [], Lender._lend

    def watched(self: Lender, path: str, names: tuple[str, ...]) -> None:
        lend(self, path, names)
        most.append(len(self.layers & self.running.keys()))

    monkeypatch.setattr(Lender, "_lend", watched)
    live, streamed, why = both_ways(program, tmp_path / "base", tmp_path)
    assert why is None
    assert [name for name in live if live[name] != streamed.get(name)] == []
    assert max(most) == 1
    assert len(most) > 9
    model = surgery.load(tmp_path / "stream")
    zeros = [float((held.tensor == 0).float().mean()) for name, held in inventory(model).items() if "mlp" in name]
    assert family == "bert" or max(zeros) > 0.4


@pytest.mark.slow
def test_processes_that_share_the_work_write_the_same_bytes(tmp_path: Path) -> None:
    zoo.tiny("gpt2", dtype=torch.bfloat16).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    shapes = load_meta(str(tmp_path / "base"))
    plan = surgery.plan(surgery.parse("quantize base nf4 double; lora rank 2 on ffn"), shapes.model)
    adapter = surgery.plan(surgery.parse("lora rank 2 dora on attn; ia3"), shapes.model)
    told: list[int] = []
    for jobs in (1, 2):
        out = tmp_path / f"by {jobs}"
        stream(plan, tmp_path / "base", out, origin=shapes.origin, force=False, jobs=jobs, tell=told.append)
        merged = merged_shapes(out)
        assert merged is not None
        stream_merge(out, merged, tmp_path / f"merged by {jobs}", force=False, jobs=jobs)
        codes = merged_shapes(out, requantize=True)
        assert codes is not None
        stream_merge(out, codes, tmp_path / f"codes by {jobs}", force=False, jobs=jobs)
        stream(
            adapter, tmp_path / "base", tmp_path / f"adapter by {jobs}", origin=shapes.origin, force=False, jobs=jobs
        )
    assert files(tmp_path / "by 1") == files(tmp_path / "by 2")
    for kind in ("merged", "codes", "adapter"):
        assert files(tmp_path / f"{kind} by 1") == files(tmp_path / f"{kind} by 2")
    assert "model.safetensors" not in files(tmp_path / "adapter by 1")
    written = [tensor for path in (tmp_path / "by 1").glob("*.safetensors") for tensor in load_file(path).values()]
    size = 2 * sum(tensor.nbytes for tensor in written)
    assert 0.9 * size < sum(told) <= size  # for a progress bar: of both runs, without what is the same everywhere
