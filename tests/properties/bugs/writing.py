"""Planted bugs that laws of the language must notice."""

from __future__ import annotations

from typing import Any

import surgery
import surgery.language.format
import surgery.language.source
from surgery.operations.base import Operation
from surgery.operations.lora import Lora
from tests.properties.bugs.bug import LORA, Bug, Patch


def _default_not_copied(patch: Patch) -> None:
    original = Operation.__post_init__

    def post_init(self: Any) -> None:
        original(self)
        if isinstance(self, Lora) and self.alpha == self.rank:
            object.__setattr__(self, "alpha", 16.0)

    patch.setattr(Operation, "__post_init__", post_init)


def _comment_dropped(patch: Patch) -> None:
    original = surgery.language.format._aligned
    patch.setattr(surgery.language.format, "_aligned", lambda lines: original([(text, None) for text, _ in lines]))


def _span_off_by_one(patch: Patch) -> None:
    original = surgery.language.source.Source.line_column

    def line_column(self: Any, offset: int) -> tuple[int, int]:
        line, column = original(self, offset)
        return line, column + 1

    patch.setattr(surgery.language.source.Source, "line_column", line_column)


BUGS: tuple[Bug, ...] = (
    Bug("a default changed", "defaults", _default_not_copied, LORA),
    Bug("a comment dropped", "comments stay", _comment_dropped, LORA),
    Bug("a span off by one", "errors point", _span_off_by_one, LORA),
)
