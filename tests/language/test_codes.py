"""Every error code has its page, and every page its code."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from surgery.language.data import grammar_file
from surgery.language.explain import explanations

ROOT = Path(__file__).parents[2] / "surgery"
CODE = re.compile(r"""["'](S\d{3})["']""")


def raised() -> dict[str, set[str]]:
    """Codes by the file, relative to the package, that mentions them."""
    return {str(path.relative_to(ROOT)): set(CODE.findall(path.read_text())) for path in ROOT.rglob("*.py")}


def test_every_code_is_explained_and_every_explanation_is_of_a_code() -> None:
    used = {code for codes in raised().values() for code in codes}
    assert used == set(explanations())


def test_no_code_is_explained_twice() -> None:
    titles = Counter(re.findall(r"^## (S\d{3})", grammar_file("errors.md"), re.MULTILINE))
    assert [code for code, count in titles.items() if count > 1] == []


def test_sections_have_a_title_and_a_text() -> None:
    for code, section in explanations().items():
        head, _, body = section.partition("\n")
        assert re.fullmatch(rf"## {code} \S.*[^.]", head), head
        assert len(body.split()) >= 6, code
