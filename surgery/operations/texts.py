"""Options of statements that read texts from a file."""

from __future__ import annotations

from typing import Any

from surgery.operations.options import option


def samples() -> Any:
    """`samples 128`"""
    return option("sequences of it that are read", default=128, at_least=1)


def length() -> Any:
    """`length 512`"""
    return option("tokens of each sequence, at most", default=512, at_least=2)
