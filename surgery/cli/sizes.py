"""Sizes for people."""

from __future__ import annotations

from pathlib import Path


def directory_size(path: Path) -> str:
    """Of all files in a directory: `87.3 MB`."""
    return readable(sum(file.stat().st_size for file in path.rglob("*") if file.is_file()))


def readable(size: float) -> str:
    """Bytes with a decimal unit."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.1f} {unit}" if unit != "B" else f"{size:.0f} B"
        size /= 1000
    return f"{size:.1f} GB"
