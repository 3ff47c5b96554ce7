"""The command line, called in this process or as a program of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from surgery.cli import main


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit status, both streams."""

    status: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call `main` here, in an empty directory; quick."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SURGERY_DEBUG", raising=False)

    def call(*arguments: str) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        captured = capsys.readouterr()
        status = stopped.value.code
        assert isinstance(status, int)
        return Outcome(status, captured.out, captured.err)

    return call


@pytest.fixture
def shell(tmp_path: Path) -> Run:
    """Run it as a program of its own, in an empty directory."""
    root = Path(__file__).parents[2]

    def call(*arguments: str, stdin: str = "", env: dict[str, str] | None = None) -> Outcome:
        environment = {**os.environ, "PYTHONPATH": str(root), **(env or {})}
        done = subprocess.run(
            command(arguments), cwd=tmp_path, env=environment, input=stdin, capture_output=True, text=True, check=False
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return call


def command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "surgery.cli", *arguments]
