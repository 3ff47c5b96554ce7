"""`surgery check`: every fault of some programs, without a model and without torch."""

from __future__ import annotations

import click

from surgery.cli.arguments import read_program, set_option
from surgery.errors import Diagnostic, ProgramError


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@set_option
@click.option("--print", "printed", is_flag=True, help="Print the program as understood: includes and values put in.")
def command(files: tuple[str, ...], settings: dict[str, str], printed: bool) -> None:
    """Check programs, without a model: syntax, verbs, options, values, roles, includes."""
    faults: list[Diagnostic] = []
    for name in files:
        try:
            program = read_program(name, settings)
        except ProgramError as error:
            faults += error.diagnostics
            continue
        count = len(program.statements)
        click.echo(
            str(program) if printed else f"{name}: {count} statement{'' if count == 1 else 's'}, no errors",
            nl=not printed,
        )
    if faults:
        raise ProgramError(*dict.fromkeys(faults))
