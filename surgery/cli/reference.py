"""`surgery reference`: the language reference, its verbs generated from their own options."""

from __future__ import annotations

from pathlib import Path

import click

from surgery.language.reference import MARKER, reference, verb_section
from surgery.operations import TABLE, verbs


def _complete(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    return [verb for verb in sorted(verbs()) if verb.startswith(incomplete)]


@click.command()
@click.argument("chosen", nargs=-1, metavar="[VERB]...", shell_complete=_complete)
@click.option(
    "--write", type=click.Path(dir_okay=False, exists=True, path_type=Path), help="Rewrite the verbs' part of a file."
)
def command(chosen: tuple[str, ...], write: Path | None) -> None:
    """Print the language reference, or what it says about some verbs."""
    if write is not None:
        head = write.read_text("utf-8").partition(MARKER)[0]
        write.write_text(reference(head, TABLE), "utf-8")
    elif chosen:
        click.echo("\n\n".join(verb_section(verb) for verb in chosen))
    else:
        click.echo(reference(None, verbs()), nl=False)
