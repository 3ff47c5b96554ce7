"""Golden messages: for each wrong program in messages.txt, word for word what its author is told.

After a change of wording: `SURGERY_GOLDEN=write pytest tests/language/test_messages.py`, then read the diff.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from surgery.errors import Diagnostic, ProgramError
from surgery.language import parse
from surgery.language.explain import explanations
from surgery.language.render import render
from surgery.language.source import Source, Span

FILE = Path(__file__).parent / "messages.txt"
CASES = dict(re.findall(r"^>>> (.*)\n((?:(?!>>> ).*\n)*)", FILE.read_text(), re.MULTILINE))


def told(program: str) -> str:
    with pytest.raises(ProgramError) as caught:
        parse(program, name="a.surgery", directory=Path("/nowhere"))
    return str(caught.value)


@pytest.mark.skipif(os.environ.get("SURGERY_GOLDEN") != "write", reason="rewrites the golden file")
def test_write() -> None:
    FILE.write_text("\n".join(f">>> {program}\n{told(program)}\n" for program in CASES))


@pytest.mark.parametrize("program", CASES)
def test_messages(program: str) -> None:
    assert told(program) == CASES[program].rstrip("\n")


def test_messages_show_every_code_that_a_text_alone_can_cause() -> None:
    shown = set(re.findall(r"S\d{3}", FILE.read_text()))
    # Large and deep texts, --set, cycles, broken packages, explain, a hundred errors: tested where they are caused.
    elsewhere = {"S004", "S005", "S032", "S035", "S040", "S041", "S042"}
    assert {code for code in explanations() if code < "S100"} == shown | elsewhere


def test_all_faults_are_told_at_once_in_order() -> None:
    text = (
        "lorra rank 1 on attn\nlora rank 0 dropout 0.5 init kaimin on atn\nlora rank 1 on\nprune magnitude 150% on ffn"
    )
    with pytest.raises(ProgramError) as caught:
        parse(text)
    faults = caught.value.diagnostics
    assert [fault.code for fault in faults] == ["S010", "S013", "S012", "S012", "S020", "S001", "S013"]
    assert [fault.span.text for fault in faults if fault.span] == ["lorra", "0", "0.5", "kaimin", "atn", "", "150%"]


def test_a_misspelt_required_option_is_one_fault() -> None:
    """The author made one mistake and hears of one, though `rank` is now missing too."""
    with pytest.raises(ProgramError) as caught:
        parse("lora ranks 8 on attn")
    assert [fault.code for fault in caught.value.diagnostics] == ["S011"]


def test_carets_stand_under_the_place() -> None:
    line = 'prefix init text "日本 e\u0301" lenght 3 on all layers'
    start = line.index("lenght")
    text = render(Diagnostic("S011", "unknown", Span(Source("a", line), start, start + 6), "here"))
    columns = 'prefix init text "日本 e\u0301" '
    width = len(columns) + 2 - 1  # two wide characters, one combining
    assert text.splitlines()[4] == f"  | {' ' * width}^^^^^^ here"


def test_places_in_very_long_lines_are_cut_out() -> None:
    with pytest.raises(ProgramError) as caught:
        parse("lora rank 1 on " + " + ".join(["attn"] * 10_000) + " + atn + ffn")
    text = str(caught.value)
    assert max(map(len, text.splitlines())) < 250
    assert re.search(r"\batn\b", text.splitlines()[3])


def test_colours_only_when_asked() -> None:
    fault = Diagnostic("S011", "unknown", Span(Source("a", "lora x"), 5, 6), "here", "help")
    assert "\x1b" not in render(fault)
    assert re.sub(r"\x1b\[[\d;]*m", "", render(fault, color=True)) == render(fault)


def test_faults_without_a_place() -> None:
    assert str(Diagnostic("S400", "no such file", help="look elsewhere")) == (
        "error[S400]: no such file\n = help: look elsewhere\n = `surgery explain S400` tells more"
    )
