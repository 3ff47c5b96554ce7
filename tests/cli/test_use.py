"""The commands do what they say: results on stdout alone, manners on stderr, the right exit status."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, LlamaConfig

import surgery
from tests.cli.conftest import Run, command
from tests.cli.test_bad_input import PLAIN

TOUR = str(Path(__file__).parents[2] / "specs" / "tour.surgery")
ANSI = "\x1b["


def test_the_whole_way(run: Run, tmp_path: Path) -> None:
    """apply, verify, load, merge, from_pretrained on a real model."""
    applied = run("apply", TOUR, "demo", "-o", "out")
    assert applied.status == 0, applied.err
    assert applied.err == ""
    assert "Saved in out" in applied.out
    names = {"config.json", "model.safetensors", "surgery.safetensors", "surgery.json", "tokenizer.json", "vocab.txt"}
    assert names <= set(os.listdir("out"))
    assert os.listdir() == ["out"]

    verified = run("verify", "out")
    assert verified.status == 0, verified.out + verified.err
    assert "exact_sparsity" in verified.out
    kept = json.loads(Path("out/surgery.json").read_text())["promises"]
    assert kept["holds"] is True

    model = surgery.load("out")
    dense = model.encoder.layer[0].attention.self.query.original  # type: ignore[union-attr]
    assert isinstance(dense, torch.nn.Linear)
    assert surgery.parameters(model)

    merged = run("merge", "out", "-o", "merged")
    assert merged.status == 0, merged.err
    theirs = AutoModel.from_pretrained("merged", local_files_only=True)
    for layer in theirs.encoder.layer:
        assert (layer.intermediate.dense.weight == 0).sum() * 2 >= layer.intermediate.dense.weight.numel()


@pytest.mark.parametrize(
    ("file", "tensor", "value"),
    [("surgery.safetensors", "weight_mask", 255), ("model.safetensors", "weight", 1)],
    ids=["mask", "weight"],
)
def test_broken_promise_is_exit_1(file: str, tensor: str, value: int, run: Run) -> None:
    """Somebody wrote into a mask, or into what it masks: verify names the promise, and the status is 1."""
    from safetensors.torch import load_file, save_file

    from surgery.graph.digest import digest

    Path("p").write_text("prune magnitude 50% on ffn in layers 0")
    assert run("apply", "p", "demo", "-o", "out").status == 0
    tensors = load_file(f"out/{file}")
    name = f"encoder.layer.0.output.dense.{tensor}"
    tensors[name].fill_(value)
    save_file(tensors, f"out/{file}", {"format": "pt"})
    manifest = json.loads(Path("out/surgery.json").read_text())
    manifest["tensors"][name]["digest"] = digest(tensors[name])
    Path("out/surgery.json").write_text(json.dumps(manifest))
    outcome = run("verify", "out")
    assert outcome.status == 1
    assert re.search(r"exact_sparsity.*FAILS", outcome.out)
    assert json.loads(Path("out/surgery.json").read_text())["promises"]["holds"] is False


def test_plan_changes_nothing_and_speaks_json(run: Run) -> None:
    text = run("plan", TOUR, "demo")
    data = json.loads(run("plan", TOUR, "demo", "--json").out)
    assert text.status == 0
    assert text.err == ""
    assert f"{data['totals']['trainable']:,}" in text.out
    assert ANSI not in text.out
    assert os.listdir() == []


def test_set_changes_a_parameter(run: Run) -> None:
    Path("p").write_text("let r = 8\nlora rank r on attn.q")
    trainable = [
        json.loads(run("plan", "p", "demo", "--json", *more).out)["totals"]["trainable"]
        for more in ((), ("--set", "r=16"), ("--set", "r=4", "--set", "r=16"))
    ]
    assert trainable[1] == trainable[2] == 2 * trainable[0] > 0


def test_program_on_standard_input(shell: Run) -> None:
    outcome = shell("plan", "-", "demo", stdin="lora rank 8 on attn.q")
    assert outcome.status == 0, outcome.err
    assert outcome.err == ""
    outcome = shell("plan", "-", "demo", stdin="lora ranks 8 on attn.q")
    assert "<stdin>:1:6" in outcome.err


def test_huge_config_plans_from_its_config_alone(run: Run) -> None:
    """70 billion parameters in a directory that holds one file."""
    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    Path("big").mkdir()
    config.to_json_file("big/config.json")
    Path("p").write_text("quantize base nf4 double\nlora rank 8 on all linear")
    outcome = run("plan", "p", "big", "--json")
    assert outcome.status == 0, outcome.err
    totals = json.loads(outcome.out)["totals"]
    assert 70e9 < totals["parameters"] < 71e9
    assert totals["bytes_after"] < 0.3 * totals["bytes_before"]


def test_plain_module_from_a_file(run: Run) -> None:
    """FILE.py:FUNCTION: planned, applied, verified and loaded again from the file it came from."""
    Path("plain.py").write_text(PLAIN)
    Path("p").write_text("lora rank 2 on all linear + head")
    for model in ("plain.py:mlp", "plain:mlp"):
        out = f"out{len(model)}"
        assert run("plan", "p", model).status == 0
        assert run("apply", "p", model, "-o", out).status == 0
        assert run("verify", out).status == 0
        assert len(surgery.parameters(surgery.load(out))) == 4
        assert run("merge", out, "-o", f"{out}-merged").status == 0


def test_show_prints_both_codes(run: Run) -> None:
    outcome = run("show", TOUR, "demo", "encoder.layer.0.attention.self.query")
    assert outcome.status == 0, outcome.err
    before, after = outcome.out.split(", after")
    assert "linear" in before
    assert "low_rank" not in before
    assert "low_rank" in after
    assert "lora_A: 8 x 384" in after
    outcome = run("show", TOUR, "demo", "encoder.layer.0.attention.self.quer")
    assert outcome.status == 2
    assert "S450" in outcome.err
    assert "self.query" in outcome.err


def test_existing_output_is_replaced_on_request_only(run: Run) -> None:
    Path("p").write_text("lora rank 2 on attn.q in layers 0")
    assert run("apply", "p", "demo", "-o", "out").status == 0
    before = Path("out/surgery.json").stat().st_mtime_ns
    assert run("apply", "p", "demo", "-o", "out").status == 2
    assert Path("out/surgery.json").stat().st_mtime_ns == before
    assert run("apply", "p", "demo", "-o", "out", "--force").status == 0
    assert Path("out/surgery.json").stat().st_mtime_ns > before
    assert sorted(os.listdir()) == ["out", "p"]


def test_output_is_no_base(run: Run) -> None:
    Path("p").write_text("lora rank 2 on attn.q in layers 0")
    run("apply", "p", "demo", "-o", "out")
    outcome = run("anatomy", "out")
    assert outcome.status == 2
    assert "S404" in outcome.err
    assert "surgery merge out" in outcome.err


def test_a_second_program_on_an_output_is_as_if_both_had_been_one(run: Run) -> None:
    Path("p").write_text("lora rank 2 on attn.q in layers 0")
    Path("q").write_text("quantize nf4 on attn.q in layers 0\nia3 on ffn.down in layers 1")
    Path("both").write_text(Path("p").read_text() + "\n" + Path("q").read_text())
    assert run("apply", "p", "demo", "-o", "out").status == 0
    planned = run("plan", "q", "out")
    assert planned.status == 0, planned.err
    assert "already there" in planned.out
    outcome = run("apply", "q", "out", "-o", "again")
    assert outcome.status == 0, outcome.err
    assert run("apply", "both", "demo", "-o", "one").status == 0
    again, one = surgery.load("again").state_dict(), surgery.load("one").state_dict()
    assert again.keys() == one.keys()
    assert all(torch.equal(again[name], one[name]) for name in one)
    assert run("verify", "again").status == 0
    Path("late").write_text("prune magnitude 50% on attn.q in layers 0")
    refused = run("apply", "late", "again", "-o", "never")
    assert refused.status == 2
    assert "S106" in refused.err
    assert not Path("never").exists()


def test_help_names_every_command_and_version(run: Run) -> None:
    from surgery.cli import COMMANDS

    outcome = run("--help")
    assert outcome.status == 0
    for name in COMMANDS:
        assert re.search(rf"^  {name} ", outcome.out, re.MULTILINE)
        one = run(name, "--help")
        assert one.status == 0
        assert "Usage: surgery" in one.out
    assert run().out == outcome.out
    assert run("--version").out == f"surgery {surgery.__version__}\n"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("surgery pl", {"plan"}),
        ("surgery plan t", {"tour.surgery"}),
        ("surgery plan tour.surgery d", {"demo", "deep/model"}),
        ("surgery plan tour.surgery de", {"demo", "deep/model"}),
        ("surgery verify o", {"out"}),
        ("surgery inspect o", {"out"}),
        ("surgery inspect de", {"demo", "deep/model"}),
        ("surgery diff out d", {"demo", "deep/model"}),
        ("surgery verify out --base de", {"demo", "deep/model"}),
        ("surgery export out --to st", {"standalone"}),
        ("surgery reference lo", {"lora", "lottery"}),
        ("surgery explain pref", {"prefix"}),
    ],
)
def test_completion(words: str, wanted: set[str], shell: Run, tmp_path: Path) -> None:
    """Commands, programs, models, outputs and verbs."""
    (tmp_path / "tour.surgery").write_text("")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "deep" / "model").mkdir(parents=True)
    (tmp_path / "deep" / "model" / "config.json").write_text("{}")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "surgery.json").write_text("{}")
    env = {"_SURGERY_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    outcome = shell(env=env)
    assert {line.partition(",")[2] for line in outcome.out.splitlines()} == wanted


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_completion_scripts(name: str, run: Run) -> None:
    assert "_SURGERY_COMPLETE" in run("completion", name).out


def on_terminal(arguments: list[str], directory: Path, **more: str) -> str:
    """What a command writes to a terminal that is its stderr."""
    leader, follower = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TERM": "xterm-256color", **more}
    with subprocess.Popen(arguments, cwd=directory, env=env, stdout=subprocess.DEVNULL, stderr=follower) as process:
        os.close(follower)
        shown = b""
        while True:
            try:
                chunk = os.read(leader, 4096)
            except OSError:
                break
            if not chunk:
                break
            shown += chunk
        process.wait(timeout=60)
    os.close(leader)
    return shown.decode()


def test_color_on_a_terminal_only(tmp_path: Path, shell: Run) -> None:
    (tmp_path / "p").write_text("lorra rank 8 on attn.q")
    assert ANSI in on_terminal(command(["check", "p"]), tmp_path)
    assert ANSI not in on_terminal(command(["check", "p"]), tmp_path, NO_COLOR="1")
    assert ANSI not in shell("check", "p").err


def test_progress_on_a_terminal_only(tmp_path: Path) -> None:
    """Whatever takes longer than a second says what it is."""
    slow = (
        "import time; from surgery.cli.progress import progress\n"
        "with progress('carving', lambda: 2) as tell:\n"
        "    time.sleep(1.5); tell(1); time.sleep(0.3)\n"
        "with progress('blinking'): pass\n"
    )
    arguments = [*command([])[:1], "-c", slow]
    shown = on_terminal(arguments, tmp_path)
    assert "carving" in shown
    assert "blinking" not in shown
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    piped = subprocess.run(arguments, env=env, capture_output=True, check=True)
    assert piped.stderr == b""
