"""`surgery explain`: the long story of an error code, or the options of a verb."""

from __future__ import annotations

import re

import click
from click.shell_completion import CompletionItem

from surgery.cli.reference import next_words
from surgery.errors import ProgramError
from surgery.language.explain import explain, explanations
from surgery.language.reference import verb_section
from surgery.language.source import Source, Span
from surgery.language.suggest import did_you_mean
from surgery.operations import Vocabulary, lookup, verbs


def _complete(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    said = ctx.params.get(parameter.name or "") or ()
    known = [*next_words(said), *(() if said else explanations())]
    return [CompletionItem(word) for word in known if word.lower().startswith(incomplete.lower())]


@click.command()
@click.argument("words", nargs=-1, metavar="[CODE|VERB]", shell_complete=_complete)
def command(words: tuple[str, ...]) -> None:
    """Tell the long story of an error code, or the options of a verb; without either, list both."""
    topic = " ".join(words)
    if not topic:
        click.echo(_overview())
    elif re.fullmatch(r"[Ss]\d+", topic):
        click.echo(_code(topic))
    elif lookup(topic) is not None:
        click.echo(verb_section(topic))
    elif longer := Vocabulary().longer(topic):
        click.echo("\n\n".join(map(verb_section, longer)))
    else:
        raise _unknown(topic)


def _overview() -> str:
    codes = [section.splitlines()[0].removeprefix("## ") for section in explanations().values()]
    return "\n".join(["Verbs:", f"  {', '.join(sorted(verbs()))}", "", "Codes:", *(f"  {code}" for code in codes)])


def _code(code: str) -> str:
    section = explain(code)
    if section is None:
        raise _unknown(code)
    return section


def _unknown(topic: str) -> ProgramError:
    return ProgramError.of(
        "S041",
        f"there is nothing to explain about '{topic}'",
        Span(Source("explain", topic), 0, len(topic)),
        did_you_mean(topic, [*verbs(), *explanations()]),
        "`surgery explain` lists every code and verb",
    )
