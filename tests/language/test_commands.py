"""`surgery check`, `fmt`, `explain` and `reference`: what they print and change, and that none needs torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from surgery.cli import cli, main
from surgery.language.explain import explanations
from surgery.language.reference import MARKER, reference, synopsis
from surgery.operations import TABLE, lookup
from tests.language.test_examples import EXAMPLE, SPECS


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "a.surgery"
    path.write_text(EXAMPLE)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


def test_check_needs_no_torch() -> None:
    """The promise that lets editors check on every key: no torch, nothing that takes longer than the check itself."""
    script = (
        "import sys\nfrom surgery.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit as e: assert not e.code\n"
        "heavy = {'torch', 'numpy', 'transformers', 'bitsandbytes', 'rich', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    for arguments in (["check", *map(str, SPECS)], ["fmt", "--check", *map(str, SPECS)], ["explain", "lora"]):
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_check_says_so_when_all_is_well(capsys: pytest.CaptureFixture[str], program: Path) -> None:
    assert run(capsys, "check", program) == (0, f"{program}: 4 statements, no errors\n", "")


def test_check_tells_the_faults_of_all_files(capsys: pytest.CaptureFixture[str], program: Path, tmp_path: Path) -> None:
    (tmp_path / "b.surgery").write_text("lora rank 0 on attn")
    (tmp_path / "c.surgery").write_text("lorra")
    status, out, err = run(capsys, "check", tmp_path / "b.surgery", program, tmp_path / "c.surgery")
    assert (status, out) == (2, f"{program}: 4 statements, no errors\n")
    assert "error[S013]" in err
    assert "b.surgery:1:11" in err
    assert "error[S010]" in err
    assert "Traceback" not in err


def test_check_prints_the_program_as_understood(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "b.surgery").write_text("let r = 8; lora   rank r on attn.q , v")
    assert run(capsys, "check", "--print", "--set", "r=2", tmp_path / "b.surgery")[1] == "lora rank 2 on attn.q,v\n"


def test_fmt_rewrites_in_place_and_keeps_comments(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "a.surgery"
    path.write_bytes(b"\n\n  # head\r\nlora   rank 8   on attn.q , v# why\r\n\r\n\r\nprune magnitude 50%   on ffn #b;c")
    path.chmod(0o640)
    assert run(capsys, "fmt", "--check", path)[0] == 1
    assert run(capsys, "fmt", path)[:2] == (0, f"{path}: formatted\n")
    assert path.read_bytes().decode() == (
        "# head\nlora rank 8 on attn.q,v  # why\n\nprune magnitude 50% on ffn  #b;c\n"
    )
    assert path.stat().st_mode & 0o777 == 0o640
    assert [child.name for child in tmp_path.iterdir()] == ["a.surgery"]
    assert run(capsys, "fmt", "--check", path) == (0, "", "")


def test_fmt_leaves_a_wrong_file_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "a.surgery"
    path.write_text("lora   rank 8 on\n")
    assert run(capsys, "fmt", path)[0] == 2
    assert path.read_text() == "lora   rank 8 on\n"


def test_fmt_aligns_comments_of_neighbouring_lines() -> None:
    text = "a x # one\n\nlonger statement # two\nb # three\nc\n"
    done = CliRunner().invoke(cli, ["fmt", "-"], input=text)
    assert done.output == "a x  # one\n\nlonger statement  # two\nb                 # three\nc\n"


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "explain", "s013")
    assert (status, out.rstrip("\n")) == (0, explanations()["S013"])
    assert "rank N" in run(capsys, "explain", "lora")[1]
    assert "## require size\n" in run(capsys, "explain", "require")[1], "all that begin so"
    overview = run(capsys, "explain")[1]
    assert all(code in overview for code in explanations())
    assert all(verb in overview for verb in TABLE)
    status, _, err = run(capsys, "explain", "S999")
    assert (status, "S041" in err) == (2, True)
    assert "did you mean 'lora'" in run(capsys, "explain", "loraa")[2]


def test_verbs_of_other_packages_show_everywhere(
    capsys: pytest.CaptureFixture[str], toys: Path, tmp_path: Path
) -> None:
    """Help, suggestions, completion and check treat them like ours; ours cannot be replaced; a broken one says so."""
    assert "Every way to write an option." in run(capsys, "explain", "toy")[1]
    assert "toy" in run(capsys, "explain")[1]
    assert "### toy" in run(capsys, "reference")[1]
    complete = ShellComplete(cli, {}, "surgery", "_SURGERY_COMPLETE")
    assert [item.value for item in complete.get_completions(["explain"], "to")] == ["toy"]
    assert "lora" in [item.value for item in complete.get_completions(["explain"], "")]
    path = tmp_path / "a.surgery"
    path.write_text("toy 50% on ffn ; tune lr 3")
    assert run(capsys, "check", path)[0] == 0
    path.write_text("tooy 50% on ffn ; toy widht 3 on ffn ; broken on ffn")
    status, _, err = run(capsys, "check", path)
    assert status == 2
    assert "did you mean 'toy'?" in err
    assert "did you mean 'width'?" in err
    assert "error[S040]: the verb 'broken' cannot be loaded" in err
    found = lookup("lora")
    assert found is not None
    assert found.__name__ == "Lora"


def test_the_reference_is_what_the_verbs_say(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """grammar/README.md is generated; `surgery reference --write grammar/README.md` brings it up to date."""
    page = Path(__file__).parents[2] / "grammar" / "README.md"
    assert page.read_text() == reference(None, TABLE)
    copy = tmp_path / "README.md"
    copy.write_text(page.read_text().partition(MARKER)[0] + MARKER + "stale")
    run(capsys, "reference", "--write", copy)
    assert copy.read_text() == page.read_text()


def test_synopses_name_every_option(toys: Path) -> None:
    found = lookup("toy")
    assert found is not None
    assert synopsis(found) == (
        "toy [SELECTOR] [plain|fancy] [P%|N:M|N] [width N] [steps N steps] [rate X] [drop P%] [dtype bf16|fp16] "
        "[label WORD] "
        '[title "TEXT"] [using "PATH"] [after SELECTOR] [via mlp [N]|text "TEXT"|lstm] [global] [gated]'
    )
