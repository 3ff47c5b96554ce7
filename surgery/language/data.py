"""The files of the folder grammar/, from an installed wheel or from a checkout."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def grammar_file(name: str) -> str:
    """Text of `surgery.lark`, `errors.md` or `README.md`."""
    checkout = Path(__file__).resolve().parents[2] / "grammar" / name
    if checkout.is_file():
        return checkout.read_text("utf-8")
    from importlib.resources import files

    return files("surgery.grammar").joinpath(name).read_text("utf-8")
