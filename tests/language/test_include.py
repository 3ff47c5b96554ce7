"""`let`, `--set` and `include`: values by name, texts in several files, and what goes wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from surgery.errors import ProgramError
from surgery.language import load_program, parse


def codes(text: str, **options: Any) -> list[str]:
    with pytest.raises(ProgramError) as caught:
        parse(text, **options)
    return [diagnostic.code for diagnostic in caught.value.diagnostics]


def write(folder: Path, **texts: str) -> Path:
    for name, text in texts.items():
        (folder / f"{name}.surgery").write_text(text)
    return folder / "main.surgery"


@pytest.mark.parametrize(
    ("named", "plain"),
    [
        ("let r = 8 ; lora rank r on attn", "lora rank 8 on attn"),
        ("lora rank r on attn ; let r = 8", "lora rank 8 on attn"),
        ("let p = 5% ; lora rank 1 dropout p on attn", "lora rank 1 dropout 5% on attn"),
        ("let amount = 2:4 ; prune magnitude amount on ffn", "prune magnitude 2:4 on ffn"),
        ("let how = random ; prune how 10% on ffn", "prune random 10% on ffn"),
        ("let start = pissa ; lora rank 1 init start on ffn", "lora rank 1 init pissa on ffn"),
        ("let n = 20 ; prefix n via mlp n on all layers", "prefix 20 via mlp 20 on all layers"),
        ('let t = "Bonjour" ; prefix init text t on all layers', 'prefix init text "Bonjour" on all layers'),
        ("let n = 3 ; lora rank 1 on ffn expect n", "lora rank 1 on ffn expect 3"),
        ("let rank = 8 ; lora rank rank on attn", "lora rank 8 on attn"),
    ],
)
def test_names_stand_for_values(named: str, plain: str) -> None:
    assert parse(named) == parse(plain)
    assert str(parse(named)) == str(parse(plain))


@pytest.mark.parametrize("value", [16, "16", 16.0])
def test_parameters_replace_values(value: object) -> None:
    text = "let r = 8 ; lora rank 2 alpha r on attn"
    assert parse(text, parameters={"r": value}) == parse("lora rank 2 alpha 16 on attn") != parse(text)


def test_a_parameter_may_be_a_text_with_anything_in_it() -> None:
    text = 'let t = "a" ; prefix init text t on all layers'
    for value in ("Say: # it; now", 'with "quotes"', "two words", "line\nbreak", "x = 3"):
        (statement,) = parse(text, parameters={"t": value}).statements
        assert vars(statement.operation)["init"].value == value


def test_parameters_are_checked_where_they_are_used() -> None:
    with pytest.raises(ProgramError) as caught:
        parse("let r = 8 ; lora rank r on attn", parameters={"r": "0"})
    (diagnostic,) = caught.value.diagnostics
    assert (diagnostic.code, diagnostic.span.text if diagnostic.span else "") == ("S013", "r")


def test_wrong_parameters() -> None:
    assert codes("let r = 8", parameters={"rr": 1}) == ["S032"]
    assert codes("let r = 8 ; let r = 9") == ["S031"]
    assert codes("let on = 8") == ["S033"]
    assert codes("let a.b = 8") == ["S033"]
    assert codes('let t = "\\q"') == ["S006"]


def test_includes_start_from_their_own_file(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep", one='include "two.surgery"', two="lora rank 1 on attn")
    main = write(tmp_path, main='include "deep/one.surgery"\nprune magnitude 50% on ffn')
    assert load_program(main) == parse("lora rank 1 on attn ; prune magnitude 50% on ffn")


def test_an_including_text_gives_values_to_what_it_includes(tmp_path: Path) -> None:
    main = write(tmp_path, main='let r = 4\ninclude "base.surgery"', base="let r = 8\nlora rank r on attn")
    assert load_program(main) == parse("lora rank 4 on attn")
    assert load_program(main, r=2) == parse("lora rank 2 on attn")


def test_a_file_included_twice_is_read_once(tmp_path: Path) -> None:
    base = {
        name: f'include "{after}.surgery"\ninclude "{after}.surgery"'
        for name, after in zip("abcdefgh", "bcdefghi", strict=True)
    }
    main = write(tmp_path, main='include "a.surgery"', i="lora rank 1 on attn", **base)
    assert load_program(main) == parse("lora rank 1 on attn")


def test_cycles_are_refused_with_the_chain(tmp_path: Path) -> None:
    main = write(tmp_path, main='include "a.surgery"', a='include "b.surgery"', b='include "main.surgery"')
    with pytest.raises(ProgramError, match=r"main\.surgery -> a\.surgery -> b\.surgery -> main\.surgery") as caught:
        load_program(main)
    assert [diagnostic.code for diagnostic in caught.value.diagnostics] == ["S035"]


def test_a_chain_of_ten_thousand_includes_is_refused(tmp_path: Path) -> None:
    for number in range(80):
        (tmp_path / f"{number}.surgery").write_text(f'include "{number + 1}.surgery"')
    with pytest.raises(ProgramError, match="nested deeper than 64"):
        load_program(tmp_path / "0.surgery")


def test_faults_of_all_files_are_told_at_their_places(tmp_path: Path) -> None:
    main = write(tmp_path, main='include "a.surgery"\nlorra rank 1 on attn', a="prune magnitude 150% on ffn")
    with pytest.raises(ProgramError) as caught:
        load_program(main)
    assert [f"{Path(d.span.source.name).name}:{d.code}" for d in caught.value.diagnostics if d.span] == [
        "main.surgery:S010",
        "a.surgery:S013",
    ]


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "latin.surgery").write_bytes(b"# caf\xe9")
    for name in ("nothing.surgery", "latin.surgery", "", "a\\nb"):
        with pytest.raises(ProgramError, match="S034"):
            load_program(write(tmp_path, main=f'include "{name}"'))
    with pytest.raises(ProgramError, match="S034"):
        load_program(tmp_path / "missing.surgery")
    with pytest.raises(ProgramError, match="S034"):
        load_program(tmp_path)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "main.surgery").write_bytes("\ufefflora rank 1 on attn\r\n".encode())
    assert load_program(tmp_path / "main.surgery") == parse("lora rank 1 on attn")


def test_large_and_deep_programs_are_refused(tmp_path: Path) -> None:
    assert codes("#" * 1_000_001) == ["S004"]
    assert codes("lora rank 1 on " + "(" * 10_000 + "ffn" + ")" * 10_000) == ["S005"]
    hidden = ")" * 10_000 + ";" + "lora rank 1 on " + "(" * 10_000 + "ffn" + ")" * 10_000
    assert "S005" in codes(hidden)
    assert "S005" in codes('"\n' + hidden)
    assert set(codes("lora rank 1 on (\n" * 80)) == {"S001"}
    (tmp_path / "main.surgery").write_text("\n" * 1_000_001)
    with pytest.raises(ProgramError, match="S004"):
        load_program(tmp_path / "main.surgery")
    nested = "(" * 60 + "ffn" + ")" * 60
    assert parse(f"lora rank 1 on {nested}") == parse("lora rank 1 on ffn")


def test_at_most_a_hundred_faults_are_told() -> None:
    """A megabyte of something else is refused in moments, not reported line by line."""
    for text in ("lora rank 1 on\n", "lorra\n", "\x00\n"):
        found = codes(text * 20_000)
        assert len(found) == 101
        assert found[-1] == "S042"
