"""Exported to pt2, a transformed model runs where there is torch and nothing else, with the same logits."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery.checkpoint.interchange.pt2_codes import plain_operators
from surgery.errors import CheckpointError
from surgery.graph.codes import encode
from surgery.verify.bounds import relative_error
from tests import zoo
from tests.cli.conftest import Run as Run
from tests.cli.conftest import run as run
from tests.conformance.test_interchange import answer, trained

ALONE = """
import sys

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("surgery", "transformers", "bitsandbytes", "peft"):
            raise ImportError(name)

sys.meta_path.insert(0, Refusing())
import torch

program = torch.export.load(sys.argv[1] + "/model.pt2").module()
fed, wanted = torch.load(sys.argv[1] + "/case.pt")
for each, logits in zip(fed, wanted, strict=True):
    found = program(**each)
    found = next(found[name] for name in ("logits", "last_hidden_state") if name in found)[:, -logits.shape[1] :]
    error = (found - logits).norm() / logits.norm()
    assert error < 2e-6, error
assert not {"surgery", "transformers", "bitsandbytes"} & sys.modules.keys()
print("ran", len(fed))
"""
PROGRAMS = [
    ("llama", "lora rank 2 on attn.q + ffn; prefix 3 on all layers as front"),
    ("gpt2", "prompt 3 init normal; quantize base nf4 double; lora rank 2 on attn.q,v"),
    ("bert", "lora rank 2 dora on attn; prune magnitude 50% on attn.o; prune neurons 30% by magnitude on ffn"),
    ("phi3", "quantize ffn fp4; ia3; adapter bottleneck 2 after ffn"),
    ("t5", "lora rank 2 on cross.q + embed"),
    ("qwen2", "quantize base int8; lora rank 2 dora on attn"),
]


def cases(model: Any) -> list[dict[str, torch.Tensor]]:
    """Of other sizes than it was exported with, padded and not."""
    fed = [zoo.inputs(model, 3, 11), zoo.padded(model, 9, 4), zoo.inputs(model, 5, 4, seed=2)]
    return [
        {name: each[name] for name in ("input_ids", "decoder_input_ids", "attention_mask") if name in each}
        for each in fed
    ]


@pytest.mark.parametrize(
    ("family", "program"),
    [pytest.param(*pair, marks=() if index == 1 else pytest.mark.slow) for index, pair in enumerate(PROGRAMS)],
)
def test_it_runs_where_nothing_of_ours_is(family: str, program: str, tmp_path: Path) -> None:
    model = trained(family, program)
    fed = cases(model)
    base = zoo.tiny(family)
    assert relative_error(answer(base, fed[0]), answer(model, fed[0])) > 0.01
    surgery.export(model, tmp_path / "out", to="pt2")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.pt2"]
    torch.save((fed, [answer(model, each) for each in fed]), tmp_path / "out" / "case.pt")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "out")], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.stdout == "ran 3\n", done.stderr


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_plain_operators_have_the_same_bits(format: str, double: bool) -> None:
    weight = torch.randn(37, 50, generator=torch.Generator().manual_seed(0))
    packed, state = encode(weight, format, 64, double)
    ours = plain_operators()
    absmax = state.absmax
    if double:
        nested = (absmax, state.state2.absmax, state.state2.code, 256, torch.float32)
        operator = torch.ops.bitsandbytes.dequantize_blockwise.default
        assert torch.equal(ours[operator](*nested), operator(*nested))
        absmax = operator(*nested) + state.offset
    operator = torch.ops.bitsandbytes.dequantize_4bit.default
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        arguments = (packed, absmax, 64, format, (1, weight.numel()), dtype)
        theirs = operator(*arguments)
        assert torch.equal(ours[operator](*arguments), theirs)
        assert theirs.unique().numel() > 100


def test_the_command_and_a_plain_module(run: Run, tmp_path: Path) -> None:
    Path("made.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef make():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Linear(5, 9), nn.GELU(), nn.Linear(9, 3)), (torch.randn(4, 5),)\n"
    )
    Path("p").write_text("lora rank 2 on all linear + head; prune magnitude 50% on all linear")
    assert run("apply", "p", "made.py:make", "-o", "out").status == 0
    outcome = run("export", "out", "--to", "pt2", "-o", "program")
    assert outcome.status == 0, outcome.err
    program, model = torch.export.load("program/model.pt2").module(), surgery.load("out")
    for batch in (2, 7):
        x = torch.randn(batch, 5)
        assert relative_error(program(x), model(x)) < 1e-6
    assert (program.get_parameter("0.weight") == 0).float().mean() > 0.4


def test_what_it_cannot_be_is_said(tmp_path: Path) -> None:
    mixture = trained("mixtral", "lora rank 2 on attn.q + experts")
    with pytest.raises(CheckpointError, match="S457"):
        surgery.export(mixture, tmp_path / "out", to="pt2")
    mixture.set_experts_implementation("batched_mm")
    surgery.export(mixture, tmp_path / "mixture", to="pt2")  # the way out that the message names
    program = torch.export.load(tmp_path / "mixture" / "model.pt2").module()
    for fed in cases(mixture):
        assert relative_error(program(**fed)["logits"], zoo.logits(mixture, fed)) < 2e-6
    shutil.rmtree(tmp_path / "mixture")
    with pytest.raises(CheckpointError, match="S421"):
        surgery.export(zoo.tiny("llama"), tmp_path / "out", to="pt2")

    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.on = nn.Linear(3, 3), True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.one(x)
            return y if not self.on or y.sum().item() > 0 else -y

    chosen = Choosing()
    x = (torch.randn(2, 3),)
    chosen.on = False
    made = surgery.apply(surgery.parse("lora rank 2 on head"), chosen, example_inputs=x)
    chosen.on = True
    with pytest.raises(CheckpointError, match="S456"):
        surgery.export(made, tmp_path / "out", to="pt2", example_inputs=x)
    assert list(tmp_path.iterdir()) == []
    assert made.training is True
