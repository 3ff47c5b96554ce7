"""The adapter extracted from two models is the nearest there is, and what it cannot hold is named."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.checkpoint.extracting import stream_extract, whole_of_either
from surgery.checkpoint.models import load, load_meta
from surgery.compiler.extract import statement
from surgery.errors import SurgeryError
from surgery.operations.lora_nearest import left_over, nearest
from surgery.verify.bounds import relative_error
from tests import zoo
from tests.checkpoint.test_streaming import files
from tests.cli.conftest import Run as Run
from tests.cli.conftest import run as run

SELECTORS = {
    "llama": "all linear",
    "gpt2": "attn.q,v + ffn",  # Conv1D, rows of a fused projection
    "phi3": "attn.k + ffn.up",
    "qwen2": "embed + attn",  # the head shares the table
    "bert": "all linear",
    "t5": "attn + cross.q in decoder",
}


def tuned(family: str, on: str, place: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Any, Any]:
    """A base and what it becomes under an adapter of rank 2 that is folded into it; both are also saved."""
    base = zoo.tiny(family, dtype=dtype, **changes)
    base.save_pretrained(place / "base", max_shard_size="20KB")
    model = surgery.apply(surgery.parse(f"lora rank 2 on {on}"), zoo.tiny(family, dtype=dtype, **changes))
    with torch.no_grad():
        for name, parameter in surgery.parameters(model).items():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=zoo.seeded(1, name)))
    merged = surgery.merge(model)
    merged.save_pretrained(place / "tuned", max_shard_size="30KB")
    return base, merged


def streamed(on: str, place: Path, rank: int = 2, jobs: int = 1) -> Any:
    base, theirs = (load_meta(str(place / name)) for name in ("base", "tuned"))
    plan = surgery.plan(statement(rank, on), base.model)
    assert whole_of_either(plan, base, theirs) is None
    out = place / f"stream{jobs}"
    return stream_extract(plan, place / "base", place / "tuned", out, origin=base.origin, force=False, jobs=jobs)


@pytest.mark.parametrize("family", SELECTORS)
def test_what_was_merged_is_found_again(family: str, tmp_path: Path) -> None:
    """To the last bits, streamed and in memory alike, on models of six kinds."""
    changes = {"tie_word_embeddings": False} if family == "qwen2" else {}
    base, merged = tuned(family, SELECTORS[family], tmp_path, **changes)
    found = streamed(SELECTORS[family], tmp_path)
    fed = zoo.inputs(base)
    wanted = zoo.logits(merged, fed)
    assert relative_error(zoo.logits(base, fed), wanted) > 0.02
    model = surgery.load(tmp_path / "stream1")
    assert relative_error(zoo.logits(model, fed), wanted) < 1e-5
    assert found.others == ()
    assert min(one.effect for one in found.places) > 0
    assert max(one.error for one in found.places) < 1e-5
    live = load(str(tmp_path / "base"))
    again = surgery.extract(load(str(tmp_path / "tuned")).model, live.model, rank=2, on=SELECTORS[family])
    assert again == found
    surgery.save(live.model, tmp_path / "live", origin=live.origin)
    assert files(tmp_path / "live") == files(tmp_path / "stream1")


def test_the_nearest_of_its_rank_and_the_error_that_is_told(tmp_path: Path) -> None:
    """Of a model that was tuned whole, no adapter of that rank is nearer (Eckart and Young)."""
    base, other = zoo.tiny("gpt2", dtype=torch.bfloat16), zoo.tiny("gpt2", dtype=torch.bfloat16, seed=5)
    base.save_pretrained(tmp_path / "base")
    other.save_pretrained(tmp_path / "tuned")
    found = streamed("attn + ffn", tmp_path, rank=3)
    merged = surgery.load(tmp_path / "stream1")
    seen = 0
    for one in found.places:
        place = merged.get_submodule(one.path)
        rows = slice(None)
        if "c_attn" in one.path:
            third = place.original.weight.shape[1] // 3
            rows = slice("qkv".index(one.role[-1]) * third, ("qkv".index(one.role[-1]) + 1) * third)
        ending = f"_{one.role[-1]}" if "c_attn" in one.path else ""
        a, b = (getattr(place, f"lora_{letter}{ending}").detach() for letter in "AB")
        after, before = (model.get_submodule(one.path).weight.detach().float() for model in (other, base))
        delta = (after - before).t()[rows]
        sigma = torch.linalg.svdvals(delta.double())
        assert torch.linalg.vector_norm(delta - b @ a) <= (1 + 1e-6) * sigma[3:].norm()
        assert one.error == pytest.approx(float(sigma[3:].norm() / sigma.norm()), rel=1e-5)
        assert torch.linalg.vector_norm(a) == pytest.approx(float(torch.linalg.vector_norm(b)), rel=1e-5)
        seen += 1
    assert seen == 3 * 6
    assert "transformer.wte.weight" in found.others, "named, for it is lost"
    assert "transformer.ln_f.weight" in found.others
    assert "transformer.h.0.attn.c_attn.bias" in found.others
    assert "transformer.h.0.attn.c_attn.weight" not in found.others, "its three parts cover it"
    assert "does not cover" in str(found)


@pytest.mark.parametrize("shape", [(7, 30), (30, 7), (24, 24)])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 0.0])
def test_nearest_matrix(shape: tuple[int, int], scale: float) -> None:
    """A matrix of rank 3 and noise: what is left is what a decomposition leaves, and without noise nothing is."""
    generator = torch.Generator().manual_seed(0)
    first, second, noise = (
        torch.randn(size, generator=generator, dtype=torch.float64) for size in ((shape[0], 3), (3, shape[1]), shape)
    )
    delta = first @ second + scale * noise
    a, b, real = nearest(delta, 5, 2.0)
    sigma = torch.linalg.svdvals(delta)
    assert real == (3 if scale == 0 else 5)
    assert left_over(delta, a, b, 2.0) == pytest.approx(float(sigma[5:].norm()), rel=1e-3, abs=1e-12 * float(sigma[0]))
    assert torch.allclose(delta - 2.0 * b @ a, delta - b @ a * 2, atol=0)
    assert nearest(torch.zeros(shape), 2, 1.0)[2] == 0


def test_stacks_of_experts_in_memory(run: Run, tmp_path: Path) -> None:
    base, merged = tuned("mixtral", "experts + attn.o", tmp_path)
    outcome = run("extract", "tuned", "on", "experts", "+", "attn.o", "--base", "base", "--rank", "2", "-o", "out")
    assert outcome.status == 0, outcome.err
    assert outcome.err == ""
    fed = zoo.inputs(base)
    wanted = zoo.logits(merged, fed)
    assert relative_error(zoo.logits(base, fed), wanted) > 0.02
    assert relative_error(zoo.logits(surgery.load(tmp_path / "out"), fed), wanted) < 1e-5
    assert len(re.findall(r"experts\.(gate_up|down)_proj .* 0\.00%", outcome.out)) > 3


def test_the_command_and_what_becomes_of_the_result(run: Run, tmp_path: Path) -> None:
    """A bfloat16 model with biases and norms of its own: an ordinary OUT, to PEFT and back, merged."""
    base, _ = tuned("llama", "attn", tmp_path, torch.bfloat16)
    both = load(str(tmp_path / "tuned")).model
    with torch.no_grad():
        both.model.norm.weight.add_(1)  # type: ignore[union-attr, operator]
    both.save_pretrained(tmp_path / "tuned")
    words = ("on", "attn", "in", "layers", "-2..-1")
    outcome = run("extract", "tuned", *words, "--base", "base", "--rank", "2", "-o", "out")
    assert outcome.status == 0, outcome.err
    table = [line for line in outcome.out.splitlines() if line.startswith("model.layers.") and "%" in line]
    assert len(table) == 4 * 2
    named = next(line for line in outcome.out.splitlines() if "does not cover" in line)
    assert {"model.norm.weight", "model.layers.0.self_attn.q_proj.weight"} <= set(re.findall(r"[\w.]+", named))
    assert run("verify", "out").status == 0
    assert run("export", "out", "--to", "peft", "-o", "adapter").status == 0
    assert run("import", "adapter", "--from", "peft", "--base", "base", "-o", "again").status == 0
    assert run("merge", "out", "-o", "merged").status == 0
    fed = zoo.inputs(base)
    merged = zoo.logits(load("merged").model, fed)
    assert relative_error(merged, zoo.logits(surgery.load("again"), fed)) < 0.05
    assert relative_error(merged, zoo.logits(base, fed)) > 0.05


def test_a_model_that_is_the_base_gives_a_new_adapter(tmp_path: Path) -> None:
    """Nothing is there to be extracted: A is as it starts, and can be trained on, and B is zero."""
    for name in ("base", "tuned"):
        zoo.tiny("llama").save_pretrained(tmp_path / name)
    found = streamed("attn.q", tmp_path)
    model, fresh = (
        surgery.load(tmp_path / "stream1"),
        surgery.apply(surgery.parse("lora rank 2 on attn.q"), zoo.tiny("llama")),
    )
    ours, theirs = surgery.parameters(model), surgery.parameters(fresh)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert "Nothing was extracted" in str(found)


def test_tied_tables_part(tmp_path: Path) -> None:
    """Only the head of a tied pair is adapted: the table that differs as well is named under its own name."""
    zoo.tiny("qwen2").save_pretrained(tmp_path / "base")
    zoo.tiny("qwen2", seed=3).save_pretrained(tmp_path / "tuned")
    assert "model.embed_tokens.weight" in streamed("head", tmp_path).others
    shutil.rmtree(tmp_path / "stream1")
    found = streamed("head + embed", tmp_path)
    assert not {"model.embed_tokens.weight", "lm_head.weight"} & set(found.others)
    model = surgery.load(tmp_path / "stream1")
    assert torch.equal(model.get_submodule("lm_head").weight, model.get_submodule("model.embed_tokens").weight)  # type: ignore[arg-type]


@pytest.mark.slow
def test_processes_that_share_the_work(tmp_path: Path) -> None:
    tuned("gpt2", "all linear", tmp_path, torch.bfloat16)
    one, two = (streamed("all linear", tmp_path, jobs=jobs) for jobs in (1, 2))
    assert one == two
    assert len(one.places) > 9
    assert files(tmp_path / "stream1") == files(tmp_path / "stream2")


def test_a_killed_run_is_gone_on_with_and_tells_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from surgery.checkpoint import extracting, work

    tuned("llama", "attn", tmp_path)
    whole = streamed("attn", tmp_path)
    bytes_before = files(tmp_path / "stream1")
    monkeypatch.setattr(work, "PAUSE", 0.0)
    monkeypatch.setattr(work, "THREADS", 1)
    at, done = extracting.Extracting.at, list[int]()

    def dies(self: Any, place: Any, sink: Any) -> dict[str, Tensor]:
        done.append(1)
        if len(done) == 5:
            raise KeyboardInterrupt
        return at(self, place, sink)

    kept = tmp_path / ".stream1.partial"
    shutil.rmtree(tmp_path / "stream1")
    with monkeypatch.context() as patched:
        patched.setattr(extracting.Extracting, "at", dies)
        patched.setattr("surgery.checkpoint.staging._clear", lambda place: None)
        with pytest.raises(KeyboardInterrupt):
            streamed("attn", tmp_path)
    assert (kept / "journal").exists()
    assert streamed("attn", tmp_path) == whole
    assert files(tmp_path / "stream1") == bytes_before
    assert not kept.exists()


def _resized(place: Path) -> None:
    zoo.tiny("llama", vocab_size=64).save_pretrained(place / "tuned")


def _deeper(place: Path) -> None:
    zoo.tiny("llama", num_hidden_layers=4).save_pretrained(place / "tuned")


def _no_number(place: Path) -> None:
    model = zoo.tiny("llama")
    model.model.layers[1].self_attn.q_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(place / "tuned")


BAD = {
    "shapes": (_resized, (), "S454", "61 x 24 and 64 x 24"),
    "names": (_deeper, (), "S454", "model.layers.3."),
    "numbers": (_no_number, (), "S455", "q_proj"),
    "missing": (None, (), "S401", "tuned"),
    "rank": (_deeper, ("--rank", "0"), "S400", "0"),
    "selector": (_no_number, ("on", "attn.z"), "S", "attn.z"),
    "words": (_no_number, ("attn.q",), "S400", "on SELECTOR"),
    "option": (_no_number, ("--bass", "x"), "S400", "--bass"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, run: Run, tmp_path: Path) -> None:
    make, words, code, said = BAD[name]
    zoo.tiny("llama").save_pretrained(tmp_path / "base")
    if make is not None:
        make(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    outcome = run("extract", "tuned", "--base", "base", "--rank", "2", "-o", "out", *words)
    assert outcome.status == 2
    assert code in outcome.err
    assert said in outcome.err
    assert "Traceback" not in outcome.err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_plain_modules_and_a_base_that_was_transformed() -> None:
    def model(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 9), nn.GELU(), nn.Linear(9, 3)).double()

    base, other = model(0), model(1)
    x = torch.randn(4, 5, dtype=torch.float64)
    found = surgery.extract(other, base, rank=3, on="all linear + head", example_inputs=(x,))
    assert found.model is base
    assert found.others == ("0.bias", "2.bias")
    assert found.places[1].error < 1e-14, "3 x 9 has rank 3"
    assert found.places[0].error > 0.1
    with torch.no_grad():
        whole = base[2].weight + base[2].lora_B @ base[2].lora_A
    assert relative_error(whole, other[2].weight) < 1e-14
    with pytest.raises(SurgeryError, match="S446"):
        surgery.extract(other, base, rank=1, example_inputs=(x,))
