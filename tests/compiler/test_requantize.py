"""A merge into 4 bits encodes the wide sum again, says what that costs, and happens only where it is asked for."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from surgery.checkpoint.inventory import inventory
from surgery.checkpoint.merging import merged_shapes, stream_merge
from surgery.checkpoint.models import load
from surgery.checkpoint.save import save_merged
from surgery.compiler import record_of
from surgery.errors import GraphError
from surgery.graph.rounding import Rounding
from surgery.verify.bounds import relative_error
from tests import zoo
from tests.checkpoint.test_save_load import bits, same_bits
from tests.checkpoint.test_streaming import files
from tests.cli.conftest import Run, run

__all__ = ["run"]

PROGRAMS = {
    "nf4": "quantize base nf4; lora rank 2 on all linear",
    "double": "quantize base nf4 double; lora rank 3 dora on attn; ia3",
    "fp4": "quantize ffn fp4 block 32; lora rank 2 on all linear",
    "int8": "quantize base int8; prune magnitude 50% on ffn; lora rank 2 on all linear; ia3 on attn.k,v",
    "masked": "quantize base nf4 double; prune magnitude 50% on ffn; ia3 on attn.k,v + ffn.down",
}
FAMILIES = ("llama", "gpt2", "phi3", "opt")
QUICK = [("nf4", "gpt2"), ("double", "llama"), ("fp4", "opt"), ("int8", "llama"), ("masked", "phi3")]
PAIRS = [(name, family) for name in PROGRAMS for family in FAMILIES]


def adapted(program: str, model: Any, size: float = 0.1) -> Any:
    """Transformed and trained: every tensor that is trained is moved by noise of this size."""
    surgery.apply(surgery.parse(program), model)
    with torch.no_grad():
        for name, parameter in surgery.parameters(model).items():
            parameter.add_(size * torch.randn(parameter.shape, generator=zoo.seeded(3, name)))
    return model


def codes_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.named_parameters() if name.endswith("weight_codes")}


def test_the_codes_are_of_the_sum_in_float32() -> None:
    """Against bitsandbytes on a sum of our own; the error over the effect against its own weights."""
    import bitsandbytes.functional as bnb

    model = adapted("quantize base nf4 double block 32; lora rank 2 alpha 6 on attn.o", zoo.tiny("llama"))
    exact, base = {}, {}
    for name in codes_of(model):
        site = model.get_submodule(name.rpartition(".")[0])
        with surgery.disabled(model), torch.no_grad():
            base[name] = site(torch.eye(site.facts.shape[1])).t().detach()
        factors = {key.rpartition(".")[2]: tensor.detach().double() for key, tensor in site.named_parameters()}
        exact[name] = base[name].double()
        if "lora_A" in str(factors.keys()):
            (a,) = (tensor for key, tensor in factors.items() if "lora_A" in key)
            (b,) = (tensor for key, tensor in factors.items() if "lora_B" in key)
            exact[name] = exact[name] + 3 * b @ a
    before = {name: tensor.clone() for name, tensor in codes_of(model).items()}
    report: dict[str, Rounding] = {}
    assert surgery.merge(model, requantize=True, report=report) is model
    after = codes_of(model)
    assert len(after) == len(before) > len(report) > 0
    for name, wide in exact.items():
        weight = name.removesuffix("_codes")
        if "o_proj" not in name:  # nothing is added there: the very codes
            assert torch.equal(after[name], before[name])
            assert weight not in report
            continue
        codes, state = bnb.quantize_4bit(
            wide.float().contiguous(), blocksize=32, compress_statistics=True, quant_type="nf4"
        )
        apart = (after[name].view(-1) != codes.view(-1)).float().mean()
        assert apart < 0.01  # the sum rounds otherwise where it lies between two codes
        assert not torch.equal(after[name], before[name])
        told, theirs = report[weight], bnb.dequantize_4bit(codes, state).double()
        effect = wide - base[name].double()
        assert told.effect == pytest.approx(float(effect.norm()), rel=1e-4)
        assert told.relative == pytest.approx(float((theirs - wide).norm() / effect.norm()), rel=0.02)
    assert not surgery.parameters(model)
    record = record_of(model)
    assert record is not None
    assert [str(step.statement) for step in record.plan.steps] == ["quantize base nf4 double block 32"]


@pytest.mark.parametrize(
    ("name", "family"), [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow) for pair in PAIRS]
)
def test_streamed_and_in_memory_the_same_bytes(name: str, family: str, tmp_path: Path) -> None:
    dtype = torch.bfloat16 if family in ("llama", "gpt2") else torch.float32
    zoo.tiny(family, dtype=dtype).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    loaded = load(str(tmp_path / "base"))
    model = adapted(PROGRAMS[name], loaded.model)
    surgery.save(model, tmp_path / "out", origin=loaded.origin)
    before = zoo.logits(model, zoo.inputs(model))
    shapes = merged_shapes(tmp_path / "out", requantize=True)
    assert shapes is not None
    told = stream_merge(tmp_path / "out", shapes, tmp_path / "stream", force=False)
    report: dict[str, Rounding] = {}
    merged = surgery.merge(surgery.load(tmp_path / "out"), requantize=True, report=report)
    save_merged(merged, tmp_path / "live", source=tmp_path / "out", origin=loaded.origin)
    live, streamed = files(tmp_path / "live"), files(tmp_path / "stream")
    assert list(live) == list(streamed)
    assert [file for file in live if live[file] != streamed[file]] == []
    assert told == report
    assert len(told) > 2
    again = surgery.load(tmp_path / "stream")
    same_bits(bits(again), bits(merged))
    assert codes_of(again)
    assert not surgery.parameters(again)
    assert surgery.verify(again)
    wide = surgery.merge(surgery.load(tmp_path / "out"))
    assert relative_error(zoo.logits(again, zoo.inputs(again)), zoo.logits(wide, zoo.inputs(wide))) < 1
    with surgery.disabled(model):
        assert not torch.equal(before, zoo.logits(model, zoo.inputs(model)))


def test_transformers_loads_what_was_requantized(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
    model = adapted("quantize base nf4 double; lora rank 2 on attn + ffn", zoo.tiny("llama", **sizes))
    surgery.merge(model, requantize=True)
    surgery.save(model, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    logits = zoo.logits(theirs.train(), zoo.inputs(model))  # in evaluation mode it would repack its weights
    assert relative_error(logits, zoo.logits(model, zoo.inputs(model))) < 1e-6


def test_others_stay_attached_and_a_kept_merge_can_be_taken_out() -> None:
    text = "quantize base nf4; lora rank 2 on attn as french; lora rank 1 on attn.q as german"
    model = adapted(text, zoo.tiny("llama"))
    before, start = zoo.logits(model, zoo.inputs(model)), bits(model)
    surgery.merge(model, only=["french"], requantize=True, keep=True)
    assert {"german"} == {name.rpartition("lora_")[2][2:] or "german" for name in surgery.parameters(model)}
    assert len(codes_of(model)) == len([name for name in start if name.endswith("weight_codes")])
    partly = zoo.logits(model, zoo.inputs(model))
    assert relative_error(partly, before) < 1
    with surgery.disabled(model):
        assert not torch.equal(zoo.logits(model, zoo.inputs(model)), partly)
    surgery.unmerge(model)
    same_bits(bits(model), start)
    assert torch.equal(zoo.logits(model, zoo.inputs(model)), before)


def test_an_adapter_that_drowns_between_codes_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted("quantize base nf4; lora rank 2 on ffn", zoo.tiny("llama"), size=1e-3)
    report: dict[str, Rounding] = {}
    with caplog.at_level(logging.WARNING, logger="surgery"):
        surgery.merge(copy.deepcopy(model), report=report)
        assert "is lost" not in caplog.text
        assert max(one.relative for one in report.values()) < 0.1
        report.clear()
        surgery.merge(model, requantize=True, report=report)
    assert all(one.drowns for one in report.values())
    assert "the error is larger than the change, which is lost" in caplog.text


def test_only_where_it_is_asked_for_and_means_something(tmp_path: Path, run: Run) -> None:
    """Full width without the flag; with it, 4 bits and a report; refused where nothing has codes."""
    zoo.tiny("llama", dtype=torch.bfloat16).save_pretrained("base")
    Path("p").write_text("quantize base nf4 double; lora rank 2 on attn.q")
    Path("plain").write_text("lora rank 2 on attn.q")
    for program in ("p", "plain"):
        assert run("apply", program, "base", "-o", f"{program}-out").status == 0
    wide, narrow = (
        run("merge", "p-out", "-o", out, *flag) for out, flag in (("wide", ()), ("narrow", ("--requantize",)))
    )
    assert (wide.status, narrow.status) == (0, 0), wide.err + narrow.err
    assert "quantization_config" not in json.loads(Path("wide/config.json").read_text())
    assert json.loads(Path("narrow/config.json").read_text())["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    assert "Kept" not in narrow.out
    assert run("verify", "narrow").status == 0
    refused = run("merge", "plain-out", "-o", "merged", "--requantize")
    assert (refused.status, refused.out) == (2, "")
    assert "S313" in refused.err
    assert not Path("merged").exists()
    with pytest.raises(GraphError, match="S313"):
        surgery.merge(surgery.load("plain-out"), requantize=True)
    assert inventory(surgery.load("narrow")).keys() < inventory(surgery.load("p-out")).keys()
