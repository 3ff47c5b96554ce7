"""Bad input gives one clear message with a code on stderr, exit status 2, nothing written and no traceback."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery.cli import main
from tests.cli.conftest import Outcome, Run, command

PLAIN = """
import torch
from torch import nn

class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 24)
        self.down = nn.Linear(24, 8)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))

class Stubborn(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        y = self.inner(x)
        if y.sum() > 0:  # decides on values
            return y
        return -y

def mlp():
    return Mlp(), (torch.zeros(2, 3, 8),)

def stubborn():
    return Stubborn(), (torch.zeros(2, 3, 8),)

def wide():
    return Mlp(), (torch.zeros(2, 3, 9),)

def broken():
    raise RuntimeError("no weights today")

def number():
    return 3
"""


def snapshot(directory: Path) -> dict[str, int]:
    """Every path below a directory with its size."""
    return {str(path): path.lstat().st_size for path in directory.rglob("*") if "__pycache__" not in path.parts}


def refused(outcome: Outcome, code: str) -> None:
    """Exit 2, the code in a rendered diagnostic, a quiet stdout, no traceback."""
    assert re.search(rf"^error\[{code}\]: \S", outcome.err, re.MULTILINE), outcome.err
    assert outcome.status == 2, outcome
    assert "Traceback" not in outcome.err
    assert outcome.out == ""


PROGRAMS = {
    "syntax": ("lora rank on attn.q", r"S0\d\d"),
    "unclosed text": ('prefix 20 init text "Translate on all layers', r"S0\d\d"),
    "unknown verb": ("lorra rank 8 on attn.q", r"S0\d\d"),
    "unknown option": ("lora ranks 8 on attn.q", r"S0\d\d"),
    "unknown role": ("lora rank 8 on attn.queries", r"S[02]\d\d"),
    "unknown layer": ("lora rank 8 on attn.q in layers 40..44", r"S2\d\d"),
    "rank 0": ("lora rank 0 on attn.q", r"S0\d\d"),
    "prune 150%": ("prune magnitude 150% on ffn", r"S0\d\d"),
    "rank too wide": ("lora rank 100000 on attn.q", r"S1\d\d"),
    "matches nothing": ('lora rank 8 on "no.such.*"', r"S2\d\d"),
    "role the model lacks": ("lora rank 8 on cross.q", r"S2\d\d"),
    "two quantizations": ("quantize ffn nf4\nquantize base fp4", r"S1\d\d"),
    "two adapters": ("lora rank 8 on attn.q\nlora rank 4 on attn.q,v", r"S1\d\d"),
    "expect": ("lora rank 8 on attn.q expect 5", r"S1\d\d"),
    "over 1 MB": ("# " + "x" * (1 << 20), r"S0\d\d"),
    "nested deep": ("lora rank 8 on " + "(" * 10_000 + "attn.q" + ")" * 10_000, r"S0\d\d"),
    "include of itself": ('include "program.surgery"', r"S0\d\d"),
    "include of nothing": ('include "nowhere.surgery"', r"S0\d\d"),
}


@pytest.mark.parametrize("verb", ["plan", "apply"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_bad_program(name: str, verb: str, run: Run, tmp_path: Path) -> None:
    text, code = PROGRAMS[name]
    (tmp_path / "program.surgery").write_text(text)
    before = snapshot(tmp_path)
    outcome = run(verb, "program.surgery", "demo", *(["-o", "out"] if verb == "apply" else []))
    refused(outcome, code)
    assert snapshot(tmp_path) == before


def test_all_errors_of_a_program_at_once(run: Run, tmp_path: Path) -> None:
    (tmp_path / "p").write_text("lorra rank 8 on attn.q\nlora rank 0 on attn.q\n")
    outcome = run("plan", "p", "demo")
    assert outcome.err.count("error[S") == 2


@pytest.mark.parametrize(
    ("model", "program", "code", "words"),
    [
        ("plain.py:mlp", "prefix 4 on all layers", r"S2\d\d", ""),
        ("plain.py:stubborn", "lora rank 2 on all linear", r"S2\d\d", r"plain\.py"),
        ("plain.py:wide", "lora rank 2 on all linear", "S202", "reduction dim"),
        (
            "plain.py:broken",
            "lora rank 2 on all linear",
            "S409",
            r"plain\.py:\d+: in broken: RuntimeError: no weights today",
        ),
        ("plain.py:number", "lora rank 2 on all linear", "S409", "returned int"),
        ("plain.py:nobody", "lora rank 2 on all linear", "S401", "mlp, stubborn"),
        ("nowhere.py:mlp", "lora rank 2 on all linear", "S401", "nowhere.py"),
        ("no.such.module:mlp", "lora rank 2 on all linear", "S401", "no module"),
        ("syntax.py:mlp", "lora rank 2 on all linear", "S409", "syntax.py:1"),
        ("nowhere", "lora rank 2 on all linear", "S401", "no model"),
        ("", "lora rank 2 on all linear", "S401", "no model"),
        (":", "lora rank 2 on all linear", "S401", "no model"),
        ("plain.py:", "lora rank 2 on all linear", "S401", "no model"),
        ("empty", "lora rank 2 on all linear", "S403", "config.json"),
    ],
)
def test_bad_model(model: str, program: str, code: str, words: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text(PLAIN)
    (tmp_path / "syntax.py").write_text("def mlp(:\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "p").write_text(program)
    before = snapshot(tmp_path)
    for arguments in (("plan", "p", model), ("apply", "p", model, "-o", "out")):
        outcome = run(*arguments)
        refused(outcome, code)
        assert re.search(words, outcome.err)
    assert snapshot(tmp_path) == before


@pytest.fixture
def copied(minilm_directory: Path, tmp_path: Path) -> Path:
    """A directory like MiniLM's whose weights may be spoiled; they are a link until then."""
    directory = tmp_path / "model"
    directory.mkdir()
    shutil.copyfile(minilm_directory / "config.json", directory / "config.json")
    shutil.copyfile(minilm_directory / "model.safetensors", directory / "model.safetensors")
    return directory


def _missing(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def _truncated(directory: Path) -> None:
    os.truncate(directory / "model.safetensors", 1_000_000)


def _corrupt(directory: Path) -> None:
    with (directory / "model.safetensors").open("r+b") as file:
        file.seek(8)
        file.write(b"}}}}")


def _pickle(directory: Path) -> None:
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    _missing(directory)


def _disguised(directory: Path) -> None:
    torch.save({"a": torch.ones(1)}, directory / "model.safetensors")


def _outside(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory.parent / "outside.safetensors")
    index = {"weight_map": {"embeddings.word_embeddings.weight": "../outside.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _incomplete(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors.pop("pooler.dense.bias")
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def _unknown(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "nosuchmodel", "architectures": ["NoSuchModel"]}')


def _not_json(directory: Path) -> None:
    (directory / "config.json").write_text("{nonsense")


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (_missing, "S410"),
        (_truncated, "S411"),
        (_corrupt, "S412"),
        (_pickle, "S413"),
        (_disguised, "S413"),
        (_outside, "S414"),
        (_incomplete, "S416"),
        (_unknown, "S405"),
        (_not_json, "S403"),
    ],
)
def test_bad_checkpoint(spoil: Callable[[Path], None], code: str, run: Run, copied: Path, tmp_path: Path) -> None:
    spoil(copied)
    (tmp_path / "p").write_text("lora rank 2 on attn.q")
    before = snapshot(tmp_path)
    refused(run("apply", "p", "model", "-o", "out"), code)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("out", "code"), [("there", "S430"), ("file", "S430"), ("missing/out", "S431"), ("file/out", "S431")]
)
def test_bad_output(out: str, code: str, run: Run, tmp_path: Path) -> None:
    """Refused before the model is read."""
    (tmp_path / "p").write_text("lora rank 2 on attn.q")
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("")
    before = snapshot(tmp_path)
    refused(run("apply", "p", "no-such-model", "-o", out), code)
    assert snapshot(tmp_path) == before


def test_no_permission(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p").write_text("lora rank 2 on attn.q")
    (tmp_path / "locked").mkdir(mode=0o500)
    if os.geteuid() == 0:  # may write everywhere, unless the system says otherwise
        monkeypatch.setattr(os, "access", lambda *_: False)
    refused(run("apply", "p", "demo", "-o", "locked/out"), "S431")


def test_full_disk(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system says that the disk is full in the middle of the weights."""
    from surgery.checkpoint import sink

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sink, "write_all", full)
    (tmp_path / "p").write_text("lora rank 2 on attn.q")
    before = snapshot(tmp_path)
    refused(run("apply", "p", "demo", "-o", "out"), "S433")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_writing(sent: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C leaves nothing behind, and one line; what is being written is the last."""
    (tmp_path / "p").write_text("lora rank 2 on attn.q")
    slow = (
        "import time, surgery.checkpoint.sink as s, surgery.cli as c; write = s.write_all\n"
        "def slowly(*rest):\n"
        "    write(*rest); print('writing', flush=True); time.sleep(2)\n"
        "s.write_all = slowly; c.main()"
    )
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", slow, "apply", "p", "demo", "-o", "out"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # As from a terminal: what starts the tests in the background may have had Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    assert any(name.endswith(".partial") for name in os.listdir(tmp_path))
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + sent
    assert err.startswith("error[S498]: interrupted")
    assert "Traceback" not in err
    assert os.listdir(tmp_path) == ["p"]


@pytest.mark.parametrize(
    "arguments",
    [("nope",), ("plan",), ("plan", "p"), ("apply", "p", "demo"), ("plan", "p", "demo", "--nope")],
)
def test_bad_command_line(arguments: tuple[str, ...], run: Run) -> None:
    outcome = run(*arguments)
    refused(outcome, "S400")


def test_bad_setting(run: Run, tmp_path: Path) -> None:
    (tmp_path / "p").write_text("let r = 8\nlora rank r on attn.q")
    refused(run("plan", "p", "demo", "--set", "r"), "S400")
    refused(run("plan", "p", "demo", "--set", "r=many"), r"S0\d\d")
    refused(run("plan", "p", "demo", "--set", "s=3"), r"S0\d\d")


def test_bad_program_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("missing", "binary", "."):
        refused(run("plan", name, "demo"), r"S[04]\d\d")


def test_internal_error_is_one_line(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own faults do not look like the user's, and say how to see more."""
    import surgery.checkpoint.load as load

    monkeypatch.setattr(load, "load_either", lambda spec, meta=False: 1 / 0)
    (tmp_path / "p").write_text("lora rank 2 on attn.q")
    outcome = run("plan", "p", "demo")
    refused(outcome, "S499")
    assert "SURGERY_DEBUG=1" in outcome.err
    monkeypatch.setenv("SURGERY_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(["plan", "p", "demo"])


def test_reader_that_goes_away(tmp_path: Path) -> None:
    """`surgery plan ... | head -1` is quiet."""
    (tmp_path / "p").write_text("lora rank 2 on attn.q")
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command(["plan", "p", "demo"]), cwd=tmp_path, env=env, **pipes) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 141
