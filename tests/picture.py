"""Draws specs/tour.svg, the picture in the README, from a real run: `python -m tests.picture`."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

ROOT = Path(__file__).parents[1]
WIDTH = 108
COMMANDS = ("cat specs/tour.surgery", "surgery apply specs/tour.surgery demo -o out", "surgery verify out")
STYLES = (
    (r"^\$ .*$", "bold #a6e22e"),
    (r"#.*$", "#75715e"),
    (r"\bok$", "bold #a6e22e"),
    (r"^ +[+~-] ", "bold #e6db74"),
)


def session() -> str:
    """The commands and what they print, run one after the other in an empty directory."""
    lines = []
    with tempfile.TemporaryDirectory() as place:
        Path(place, "specs").symlink_to(ROOT / "specs")
        for command in COMMANDS:
            arguments = command.split()
            if arguments[0] == "surgery":
                arguments[:1] = [sys.executable, "-m", "surgery.cli"]
            done = subprocess.run(
                arguments,
                cwd=place,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
                check=True,
            )
            lines += [f"$ {command}", done.stdout.rstrip("\n"), ""]
    return "\n".join(lines).rstrip("\n")


def picture(text: str) -> str:
    """As SVG, with whatever monospaced font the reader has."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    for line in text.split("\n"):
        shown = Text(line)
        for pattern, style in STYLES:
            shown.highlight_regex(pattern, style)
        console.print(shown, no_wrap=True, overflow="ellipsis", highlight=False)
    drawn = console.export_svg(title="model-surgery", theme=MONOKAI, unique_id="tour")
    return re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)


if __name__ == "__main__":
    (ROOT / "specs" / "tour.svg").write_text(picture(session()), "utf-8")
