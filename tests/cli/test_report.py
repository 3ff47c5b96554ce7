"""The heat strip and the page tell of every weight what an independent count finds; the page needs no other file."""

from __future__ import annotations

import os
import pty
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import surgery
from surgery.anatomy.parts import Part
from surgery.checkpoint.report import facts
from surgery.cli.heat import strips
from surgery.compiler.zeros import Cell, planned
from surgery.graph import zeros
from tests import zoo
from tests.cli.conftest import Run, command

PROGRAM = (
    "prune magnitude 50% on attn.q in layers even ; prune magnitude 80% global on ffn.down ; prune random 2:4 on attn.o"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fused and transposed weights, of which attn.q is a third."""
    place = tmp_path_factory.mktemp("base") / "gpt2"
    zoo.tiny("gpt2", n_embd=24, n_inner=40).save_pretrained(place)
    return place


@pytest.fixture
def out(base: Path, run: Run) -> Path:
    Path("p").write_text(PROGRAM)
    assert run("apply", "p", str(base), "-o", "out").status == 0
    return Path("out")


def rows(text: str) -> dict[str, tuple[str, str]]:
    """Cells and total by role."""
    found = re.findall(r"^    (\S+) +([0-9.?]+)  (\S.*)$", text.partition("  Zeros ")[2], re.MULTILINE)
    return {role: (cells, total) for role, cells, total in found}


def shares(directory: Path) -> dict[str, list[float]]:
    """Of zeros, by role and layer, from the tensors' own names."""
    tensors = load_file(directory / "model.safetensors")
    found: dict[str, list[float]] = {"attn.q": [], "attn.o": [], "ffn.down": []}
    for layer in range(3):
        stem = f"transformer.h.{layer}"
        fused, out, down = (tensors[f"{stem}.{name}.weight"] for name in ("attn.c_attn", "attn.c_proj", "mlp.c_proj"))
        read = (fused[:, :24], out, down)
        for role, weight in zip(found, read, strict=True):
            found[role].append(float((weight == 0).float().mean()))
    return found


def test_the_strip_is_what_the_masks_will_be_and_are(out: Path, base: Path, run: Run) -> None:
    said = run("plan", "p", str(base))
    assert said.out.isascii()
    assert rows(said.out) == {
        "attn.q": ("5.5", "50.0%"),
        "attn.o": ("555", "50.0%"),
        "ffn.down": ("???", "known with the weights"),
    }
    counted = shares(out)
    assert counted["attn.q"] == [0.5, 0.0, 0.5]
    shown = rows(run("inspect", "out").out)
    assert shown["attn.q"] == ("5.5", "50.0%")
    assert shown["ffn.down"] == ("".join(str(int(share * 10)) for share in counted["ffn.down"]), "80.0%")


def test_a_program_without_masks_has_no_strip(base: Path, run: Run) -> None:
    Path("q").write_text("lora rank 2 on attn.q")
    assert "Zeros" not in run("plan", "q", str(base)).out
    plan = surgery.plan(surgery.parse("lora rank 2 on attn.q ; sparse static 80% on ffn"), zoo.tiny("llama"))
    cells = planned(plan)
    assert {cell.role for cell in cells} == {"ffn.gate", "ffn.up", "ffn.down"}
    assert sum(cell.zeros or 0 for cell in cells) == pytest.approx(0.8 * sum(cell.size for cell in cells), abs=9)


@pytest.mark.slow
def test_blocks_where_there_is_a_terminal_that_has_them(base: Path, tmp_path: Path) -> None:
    (tmp_path / "p").write_text("prune magnitude 50% on ffn")
    seen = {}
    for name, env in (("plain", {}), ("uncoloured", {"NO_COLOR": "1"}), ("ascii", {"PYTHONIOENCODING": "ascii"})):
        master, slave = pty.openpty()
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TERM": "xterm", **env}
        if "NO_COLOR" not in env:
            environment.pop("NO_COLOR", None)
        with subprocess.Popen(
            command(["plan", "p", str(base)]), cwd=tmp_path, env=environment, stdout=slave, stderr=subprocess.DEVNULL
        ) as process:
            os.close(slave)
            text = b""
            while piece := _piece(master):
                text += piece
        os.close(master)
        assert process.returncode == 0
        seen[name] = text.decode()
    assert seen["plain"].count("▅") == 6
    assert "\x1b[38;5;" in seen["plain"]
    assert "  555  50.0%" in seen["uncoloured"]
    assert "  555  50.0%" in seen["ascii"]
    assert seen["uncoloured"].isascii()
    assert seen["ascii"].isascii()


def _piece(master: int) -> bytes:
    try:
        return os.read(master, 65536)
    except OSError:  # Linux says so when the other end is closed
        return b""


def test_more_than_one_stack_and_more_than_ten_layers() -> None:
    cells = [Cell("ffn", stack, layer, 100 - layer, 100) for stack in ("encoder", "decoder") for layer in range(12)]
    lines = list(strips(cells, blocks=False))
    assert [line.split()[1] for line in lines if "Zeros" in line] == ["encoder", "decoder"]
    assert "         0         10" in lines[1]
    assert lines[2].split()[1] == "999999999998"[:12]


class Page(HTMLParser):
    """What a page asks others for, its pictures, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.open: list[str] = []
        self.pictures: list[set[str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.asked += [name for name, _ in attrs if name in ("src", "href", "xlink:href", "srcset")]
        if tag == "svg":
            self.pictures.append({name for name, _ in attrs})
        elif self.open and self.open[-1] == "svg":
            self.pictures[-1].add(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_says_what_it_shows(out: Path, run: Run) -> None:
    done = run("report", "out")
    assert done.status == 0, done.err
    text = Path("out.html").read_text("utf-8")
    page = Page(text)
    assert page.open == []
    assert page.asked == []
    assert not re.search(r"https?:|@import|url\(", text)
    assert len(page.pictures) == 4
    assert all({"role", "aria-labelledby", "title", "desc"} <= picture for picture in page.pictures)
    assert "prefers-color-scheme: dark" in text
    for role, counted in shares(out).items():
        for layer, share in enumerate(counted):
            assert f"<title>{role}, layer {layer}: {share:.2%} of" in text
    assert run("report", "out").status == 2, "what lies there stays"
    assert run("report", "out", "-f", "-o", "out.html").status == 0
    assert sorted(os.listdir()) == ["out", "out.html", "p"]
    assert "S440" in run("report", ".", "-o", "x.html").err


def test_magnitudes_of_what_was_cut_come_from_the_base(out: Path, base: Path, run: Run) -> None:
    found = facts(out)
    assert found.compared
    before, after = (load_file(place / "model.safetensors") for place in (base, out))
    kept = cut = 0
    largest = 0.0
    for layer in range(3):
        name = f"transformer.h.{layer}.mlp.c_proj.weight"
        gone = after[name] == 0
        kept, cut = kept + int((~gone).sum()), cut + int(gone.sum())
        largest = max(largest, float(before[name][gone].abs().max()))
    told = found.magnitudes["ffn.down"]
    assert (sum(told.kept), sum(told.cut), told.gone) == (kept, cut, cut)
    last = max(index for index, count in enumerate(told.cut) if count)
    assert 2.0 ** (-24 + last / 2) <= largest < 2.0 ** (-24 + (last + 1) / 2)
    assert not any(told.kept[:last]), "global by magnitude: the smallest of all have gone"
    assert set(found.magnitudes) == {"attn.q", "attn.o", "ffn.down"}


def test_one_place_is_in_memory_at_a_time(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor without numbers has room for one of them alone."""
    read, weight_of = [], zeros.weight_of

    def watched(model: torch.nn.Module, part: Part) -> torch.Tensor:
        held = [name for name, tensor in model.named_parameters() if tensor.untyped_storage().nbytes() >= tensor.nbytes]
        assert {name.rpartition(".")[0] for name in held} == {part.path}
        read.append(part.path)
        return weight_of(model, part)

    monkeypatch.setattr(zeros, "weight_of", watched)
    facts(out)
    assert len(set(read)) == 12


def test_what_was_cut_out_and_what_is_not_known(base: Path, run: Run) -> None:
    """Layers with other numbers are not compared; a base that is gone is not either."""
    zoo.tiny("llama", intermediate_size=64).save_pretrained("base")
    Path("p").write_text("prune neurons 25% on ffn in layers 0..1 ; drop layers 2 ; prune magnitude 50% on attn.q")
    Path("q").write_text("repeat layers 1 silent")
    assert run("apply", "q", "base", "-o", "silent").status == 0
    assert run("report", "silent").status == 0, "weights of which none has a size have no histogram"
    assert "Magnitudes" not in Path("silent.html").read_text("utf-8")
    assert run("apply", "p", "base", "-o", "out").status == 0
    found = facts(Path("out"))
    assert [(unit.kept, unit.count) for unit in found.units] == [(48, 64), (48, 64)]
    assert found.depths == (("decoder", 3, 2),)
    assert not found.compared
    assert run("report", "out").status == 0
    text = Path("out.html").read_text("utf-8")
    assert "48 of 64" in text
    assert "3 → 2" in text
    assert "gone or has other layers" in text


@pytest.mark.slow
def test_quantized_weights_are_told_of_as_they_are_used(run: Run) -> None:
    zoo.tiny("gpt2", dtype=torch.bfloat16).save_pretrained("base")
    Path("p").write_text("quantize ffn nf4 double ; prune magnitude 37% on ffn.up ; lora rank 2 on ffn.up")
    assert run("apply", "p", "base", "-o", "out").status == 0
    found = facts(Path("out"))
    cells = [cell for cell in found.cells if cell.role == "ffn.up"]
    assert len(cells) == 3
    assert all(0.37 <= (cell.zeros or 0) / cell.size + 1e-3 < 0.6 for cell in cells)
    model: Any = surgery.load("out")
    with torch.no_grad(), surgery.disabled(model):
        module = model.transformer.h[0].mlp.c_fc
        weight = module(torch.eye(21, dtype=torch.bfloat16)) - module(torch.zeros(1, 21, dtype=torch.bfloat16))
    assert abs(int((weight == 0).sum()) - (cells[0].zeros or 0)) <= 0.02 * cells[0].size
