"""Laws of the language: what is written, printed and reported."""

from __future__ import annotations

import pytest

import surgery
from tests.properties.case import Case, Law
from tests.properties.drawn import ANY, cases, plain_loras


def prints_and_parses(case: Case) -> None:
    assert surgery.parse(str(case.program)) == case.program
    assert str(surgery.parse(str(case.program))) == str(case.program)


def comments_stay(case: Case) -> None:
    from surgery.language import format_text

    lines = [f"{line}   #  note {number}" for number, line in enumerate(str(case.program).splitlines())]
    text = format_text("\n".join(["# first", *lines, "# last"]))
    for number in range(len(lines)):
        assert f"note {number}" in text
    assert text.startswith("# first")
    assert "# last" in text
    assert format_text(text) == text
    assert surgery.parse(text) == case.program


def errors_point_at_the_place(case: Case) -> None:
    text = str(case.program)
    start = text.index(" on ") + 1
    broken = text[:start] + "onn" + text[start + 2 :]
    with pytest.raises(surgery.SurgeryError) as refused:
        surgery.parse(broken, name="p")
    spans = [each.span for each in refused.value.diagnostics]
    assert all(span is not None and 0 <= span.start <= span.stop <= len(broken) for span in spans)
    line, column = broken[:start].count("\n") + 1, start - (broken.rfind("\n", 0, start) + 1) + 1
    assert any(str(span) == f"p:{line}:{column}" for span in spans), f"none at {line}:{column}"


def defaults_are_the_papers(case: Case) -> None:
    """Facts written by hand: what a short statement means."""
    (lora, quantize, prefix) = (
        statement.operation
        for statement in surgery.parse("lora rank 8 on attn.q\nquantize base nf4\nprefix 20 on all layers").statements
    )
    assert (lora.rank, lora.alpha, lora.dropout, lora.init, lora.scale, lora.dora) == (
        8,
        8,
        0,
        "kaiming",
        "alpha",
        False,
    )
    assert (quantize.format, quantize.double, quantize.block, quantize.compute) == ("nf4", False, 64, "input")
    assert (prefix.positions, prefix.via, prefix.gated, prefix.init) == (20, None, False, None)


LAWS: tuple[Law, ...] = (
    Law("prints and parses", "what is printed is read back", prints_and_parses, ANY, 0),
    Law("comments stay", "formatting keeps every comment and is idempotent", comments_stay, ANY, 0),
    Law(
        "errors point", "a misspelt word is reported where it stands", errors_point_at_the_place, cases(plain_loras), 0
    ),
    Law("defaults", "a short statement means what the papers do", defaults_are_the_papers, ANY, 0),
)
