"""`surgery fmt`: programs in canonical form, in place; `--check` only says which are not."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import click

from surgery.errors import CheckpointError, Diagnostic, ProgramError
from surgery.language.format import format_text


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--check", is_flag=True, help="Change nothing; exit 1 when a file is not formatted.")
@click.pass_context
def command(context: click.Context, files: tuple[str, ...], check: bool) -> None:
    """Format programs in place; `-` formats standard input to standard output.

    Comments and blank lines stay, spacing becomes uniform. A file with a syntax error is left alone.
    """
    faults: list[Diagnostic] = []
    changed: list[str] = []
    for name in files:
        try:
            text = _read(name)
            formatted = format_text(text, "<stdin>" if name == "-" else name)
        except ProgramError as error:
            faults += error.diagnostics
            continue
        if name == "-" and not check:
            click.echo(formatted, nl=False)
        elif formatted != text:
            changed.append(name)
            if not check:
                _replace(Path(name), formatted)
    for name in changed:
        click.echo(f"{name}: not formatted" if check else f"{name}: formatted")
    if faults:
        raise ProgramError(*faults)
    if check and changed:
        context.exit(1)


def _read(name: str) -> str:
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return data.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = "is not UTF-8 text" if isinstance(error, UnicodeError) else getattr(error, "strerror", str(error))
        raise ProgramError.of("S034", f"cannot read {name}: {reason}") from error


def _replace(path: Path, text: str) -> None:
    """Write beside the file and rename, so that a killed run leaves the old text or the new one."""
    path = path.resolve()  # a link stays a link
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.chmod(file.name, path.stat().st_mode & 0o777)
        os.replace(file.name, path)
    except OSError as error:
        raise CheckpointError.of("S415", f"`{path}`: {error.strerror or error}") from error
