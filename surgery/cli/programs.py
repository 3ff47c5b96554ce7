"""PROGRAM and `--set` on the command line, the same for every command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from surgery.errors import ProgramError
from surgery.language.load import load_program, parse
from surgery.language.program import Program
from surgery.language.source import NOWHERE

LARGEST = 1_000_000


def _assignments(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    assigned: dict[str, str] = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"'{value}' is not NAME=VALUE")
        assigned[name.strip()] = text.strip()
    return assigned


set_option: Any = click.option(
    "--set",
    "parameters",
    multiple=True,
    metavar="NAME=VALUE",
    callback=_assignments,
    help="Value of one of the program's `let` names; may be repeated.",
)


def read_text(name: str) -> str:
    """A program's text from a file, or from standard input for `-`. Raises ProgramError (S034)."""
    try:
        data = sys.stdin.buffer.read(LARGEST + 1) if name == "-" else Path(name).read_bytes()
        return data.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = (
            "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else getattr(error, "strerror", str(error))
        )
        raise ProgramError.of("S034", f"cannot read {name}: {reason}", NOWHERE) from error


def read_program(name: str, parameters: dict[str, str]) -> Program:
    """The program in a file, or on standard input for `-`. Raises ProgramError with every fault."""
    if name == "-":
        return parse(read_text("-"), name="<stdin>", parameters=parameters, directory=Path.cwd())
    return load_program(name, **parameters)
