"""A merge tells what rounding did to the change of every tensor, and warns where it took most of it."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from surgery.checkpoint.merging import merged_shapes, stream_merge
from surgery.cli import cli
from surgery.compiler.merge import drowned
from surgery.graph.rounding import Rounding
from tests import zoo

PROGRAM = "lora rank 2 on attn.q + ffn.down"


def adapted(size: float, family: str = "llama", dtype: torch.dtype = torch.bfloat16, program: str = PROGRAM) -> Any:
    """A model whose adapters are trained to changes of about this size, its weights being about 0.02."""
    model = surgery.apply(surgery.parse(program), zoo.tiny(family, dtype=dtype))
    generator = torch.Generator().manual_seed(0)
    for parameter in surgery.parameters(model).values():
        parameter.data.copy_(size**0.5 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_figures_are_those_of_float64(family: str) -> None:
    """merges: error over effect and the share left alone, against the same sums in float64."""
    model = adapted(1e-4, family)
    before = copy.deepcopy(model).requires_grad_(False)
    report: dict[str, Rounding] = {}
    surgery.merge(model, report=report)
    sites = {path: before.get_submodule(path) for path in (name.rpartition(".")[0] for name in report)}
    assert len(report) == len({name.rpartition(".")[0] for name in surgery.parameters(before)}) > 1
    for path, site in sites.items():
        merged, base = model.get_parameter(f"{path}.weight").double(), site.weight.double()
        (a,) = (tensor for name, tensor in site.named_parameters() if "lora_A" in name)
        (b,) = (tensor for name, tensor in site.named_parameters() if "lora_B" in name)
        effect = b.double() @ a.double()
        if family == "gpt2":  # (in, out), and attn.q is a third of the rows
            full = torch.zeros(base.shape[1], base.shape[0], dtype=torch.float64)
            full[: effect.shape[0]] = effect
            effect = full.t()
        told = report[f"{path}.weight"]
        changed = effect != 0
        assert told.changed == changed.sum()
        assert told.effect == pytest.approx(float(effect.norm()), rel=1e-3)
        assert told.error == pytest.approx(float((merged - base - effect).norm()), rel=1e-2)
        assert told.left == pytest.approx(int(((merged == base) & changed).sum()), abs=2)
        assert 0 < told.relative < 1
        assert 0 < told.left < told.changed


def test_an_adapter_that_drowns(caplog: pytest.LogCaptureFixture) -> None:
    """Changes far below half a unit in the last place of bfloat16; float32 has room for them."""
    report: dict[str, Rounding] = {}
    with caplog.at_level(logging.WARNING, logger="surgery"):
        surgery.merge(adapted(1e-7), report=report)
    assert [record.levelname for record in caplog.records if record.name.startswith("surgery")] == ["WARNING"]
    assert all(one.drowns and one.relative > 0.5 for one in report.values())
    assert "rounding leaves most entries" in drowned(report)
    caplog.clear()
    wide: dict[str, Rounding] = {}
    with caplog.at_level(logging.WARNING, logger="surgery"):
        surgery.merge(adapted(1e-7, dtype=torch.float32), report=wide)
    assert not [record for record in caplog.records if record.name.startswith("surgery")]
    assert wide.keys() == report.keys()
    assert max(one.relative for one in wide.values()) < 0.1


def test_what_changes_nothing_is_not_told() -> None:
    model = surgery.apply(surgery.parse(PROGRAM), zoo.tiny("llama", dtype=torch.bfloat16))
    report: dict[str, Rounding] = {}
    surgery.merge(model, report=report)
    assert report == {}


def test_streamed_by_any_number_of_processes_and_at_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo.tiny("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    model = adapted(1e-7)
    surgery.save(model, tmp_path / "out", origin=str(tmp_path / "base"))
    told = []
    for jobs in (1, 2):
        shapes = merged_shapes(tmp_path / "out")
        assert shapes is not None
        told.append(stream_merge(tmp_path / "out", shapes, tmp_path / f"merged-{jobs}", force=False, jobs=jobs))
    report: dict[str, Rounding] = {}
    surgery.merge(model, report=report)
    assert told[0] == told[1]
    assert {name: (one.changed, one.left) for name, one in told[0].items()} == {
        name: (one.changed, one.left) for name, one in report.items()
    }
    cli.main(["merge", str(tmp_path / "out"), "-o", str(tmp_path / "text")], standalone_mode=False)
    said = capsys.readouterr()
    assert "error over effect" in said.out
    assert "entries left alone" in said.out
    assert "warning: in" in said.err
    cli.main(["merge", str(tmp_path / "out"), "-o", str(tmp_path / "json"), "--json"], standalone_mode=False)
    data = json.loads(capsys.readouterr().out)
    assert {name: one["left"] for name, one in data["tensors"].items()} == {n: one.left for n, one in report.items()}
