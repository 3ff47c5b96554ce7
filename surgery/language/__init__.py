"""The language: text to Program, and back to text. Knows no torch. Loaded as needed: a method needs selectors only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery.language.format import format_text as format_text
    from surgery.language.load import load_program as load_program
    from surgery.language.load import parse as parse

HOMES = {
    "format_text": "surgery.language.format",
    "load_program": "surgery.language.load",
    "parse": "surgery.language.load",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(HOMES[name]), name)
