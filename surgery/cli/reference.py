"""`surgery reference`: the language reference, its verbs generated from their own options."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from surgery.language.reference import MARKER, reference, verb_section
from surgery.operations import TABLE, verbs


def _complete(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    said = ctx.params.get(parameter.name or "") or ()
    return [word for word in next_words(said[-1:]) if word.startswith(incomplete)]


def next_words(said: Sequence[str]) -> list[str]:
    """What may follow, for completion: verbs, or the second words of the verb that was just said and then verbs."""
    known = sorted(verbs())
    firsts = [verb for verb in known if " " not in verb]
    return [verb.partition(" ")[2] for verb in known if said and verb.startswith(f"{said[-1]} ")] + firsts


def joined(words: Sequence[str]) -> list[str]:
    """The verbs that some words are, of one word or two."""
    found: list[str] = []
    known = verbs()
    for word in words:
        if found and f"{found[-1]} {word}" in known:
            found[-1] = f"{found[-1]} {word}"
        else:
            found.append(word)
    return found


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
        click.echo("\n\n".join(verb_section(verb) for verb in joined(chosen)))
    else:
        click.echo(reference(None, verbs()), nl=False)
