"""Sizes for people."""

from __future__ import annotations

from pathlib import Path


def directory_size(path: Path) -> str:
    """Of all files in a directory: `87.3 MB`."""
    return readable(sum(file.stat().st_size for file in path.rglob("*") if file.is_file()))


def saved(path: Path) -> str:
    """What `apply` and its like end with: where a result lies, how large it is, and what it refers to."""
    from surgery.checkpoint.manifest import Manifest

    base = Manifest.read(path).base
    line = f"Saved in {path} ({directory_size(path)})."
    return line if base is None else f"{line} Its base stays in {base.path}; --standalone copies it."


def readable(size: float) -> str:
    """Bytes with a decimal unit."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.1f} {unit}" if unit != "B" else f"{size:.0f} B"
        size /= 1000
    return f"{size:.1f} GB"
