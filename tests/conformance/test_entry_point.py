"""A verb from another package parses, plans, applies, and is known to help and suggestions, as ours are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import surgery
from tests import zoo

SOURCE = '''
"""A method in one file: y = W x + gain * y, gain zero at the start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from surgery.lazy import torch
from surgery.operations.base import Number, Operation, option


@dataclass(frozen=True, kw_only=True)
class Amplify(Operation):
    """Scale a projection's output by 1 + gain, a number that is trained."""

    verb: ClassVar[str] = "amplify"
    phase: ClassVar[str] = "attach"
    acts_on: ClassVar[tuple[str, ...]] = ("projection",)

    start: Number = option("gain at the start", default=0.0)

    def promises(self) -> tuple[str, ...]:
        return ("identity_at_init", "merges", "off_means_off") if self.start == 0 else ("merges", "off_means_off")

    def rewrite(self, site) -> None:
        start = self.start
        gain = site.parameter("gain", (1,), lambda tensor, generator: tensor.fill_(start))
        site.add_to_output(site.call(torch.mul, site.base, gain))
'''


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """An installed package, in a directory of its own, whose entry point names the verb."""
    (tmp_path / "amplifier.py").write_text(SOURCE)
    information = tmp_path / "amplifier-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: amplifier\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[surgery.operations]\namplify = amplifier:Amplify\n")
    return tmp_path


@pytest.fixture
def installed(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(elsewhere))
    yield
    sys.modules.pop("amplifier", None)


@pytest.mark.usefixtures("installed")
def test_the_verb_applies_trains_and_merges() -> None:
    one = zoo.specimen("llama", dtype=torch.float64)
    base = one.logits()
    program = surgery.parse("amplify on ffn.down")
    assert str(surgery.plan(program, one.model)).count("amplify")
    model = surgery.apply(program, one.model)
    assert torch.equal(one.logits(), base)
    with torch.no_grad():
        for parameter in surgery.parameters(model).values():
            parameter.fill_(0.5)
    changed = one.logits()
    assert not torch.allclose(changed, base, atol=1e-3)
    assert surgery.verify(model)
    assert torch.allclose(zoo.logits(surgery.merge(model), one.inputs), changed, atol=1e-7)


@pytest.mark.usefixtures("installed")
def test_suggestions_and_options_know_the_verb() -> None:
    with pytest.raises(surgery.SurgeryError, match="amplify"):
        surgery.parse("amplfy on ffn")
    with pytest.raises(surgery.SurgeryError, match="start"):
        surgery.parse("amplify strat 1 on ffn")
    assert surgery.parse("amplify start 0.5 on ffn").statements[0].operation.start == 0.5


@pytest.mark.usefixtures("installed")
def test_our_verbs_cannot_be_replaced(elsewhere: Path) -> None:
    from surgery.operations.lora import Lora

    (elsewhere / "amplifier-1.0.dist-info" / "entry_points.txt").write_text(
        "[surgery.operations]\nlora = amplifier:Amplify\n"
    )
    assert isinstance(surgery.parse("lora rank 1 on ffn").statements[0].operation, Lora)


def command(elsewhere: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The console command in a process of its own, with the package installed."""
    path = os.pathsep.join([str(elsewhere), str(Path(surgery.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path}
    environment.pop("PYTEST_XDIST_WORKER", None)
    return subprocess.run(
        [sys.executable, "-m", "surgery.cli", *arguments], capture_output=True, text=True, env=environment, timeout=120
    )


def test_the_command_line_checks_explains_and_completes_it(elsewhere: Path, tmp_path: Path) -> None:
    program = tmp_path / "p.surgery"
    program.write_text("amplify start 0.5 on ffn\n")
    assert command(elsewhere, "check", str(program)).returncode == 0
    program.write_text("amplify strat 0.5 on ffn\n")
    refused = command(elsewhere, "check", str(program))
    assert refused.returncode == 2
    assert "start" in refused.stderr + refused.stdout
    assert "Traceback" not in refused.stderr
