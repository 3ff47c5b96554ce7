"""`surgery explain`: the long story of an error code, or the options of a verb."""

from __future__ import annotations

import re

import click
from click.shell_completion import CompletionItem

from surgery.errors import ProgramError
from surgery.language.explain import explain, explanations
from surgery.language.reference import verb_section
from surgery.language.source import Source, Span
from surgery.language.suggest import did_you_mean
from surgery.operations import lookup, verbs


def _complete(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    known = [*sorted(verbs()), *explanations()]
    return [CompletionItem(word) for word in known if word.lower().startswith(incomplete.lower())]


@click.command()
@click.argument("topic", required=False, metavar="[CODE|VERB]", shell_complete=_complete)
def command(topic: str | None) -> None:
    """Tell the long story of an error code, or the options of a verb; without either, list both."""
    if topic is None:
        click.echo(_overview())
    elif re.fullmatch(r"[Ss]\d+", topic):
        click.echo(_code(topic))
    elif lookup(topic) is not None:
        click.echo(verb_section(topic))
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
