"""The verb that a statement starts with, of one word or two, and what to say where there is none of that name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from surgery.errors import ProgramError
from surgery.language.source import Span
from surgery.language.suggest import did_you_mean, listed, nearest
from surgery.language.tree import Act, Word
from surgery.operations import Vocabulary
from surgery.operations.base import Operation
from surgery.operations.options import schema


def recognise(act: Act, vocabulary: Vocabulary) -> tuple[Act, type[Operation]]:
    """The statement with its whole verb, `prune heads`, taken out of its items, and the operation of that verb.

    Errors: ProgramError S010 and S015 where no verb is meant, S011 for a second word that none has.
    """
    act = _with_second_word(act, vocabulary)
    try:
        operation = vocabulary.lookup(act.verb.text)
    except ProgramError as error:
        raise ProgramError(*(replace(fault, span=act.verb.span) for fault in error.diagnostics)) from error
    if operation is not None:
        return act, operation
    longer = vocabulary.longer(act.verb.text)
    raise _unfinished(act.verb, longer) if longer else _unknown(act.verb, vocabulary.verbs())


def _with_second_word(act: Act, vocabulary: Vocabulary) -> Act:
    """The statement with a verb of two words where its first item is the second one."""
    first = act.items[0] if act.items else None
    longer = vocabulary.longer(act.verb.text) if isinstance(first, Word) else []
    if not longer or not isinstance(first, Word):
        return act
    seconds = _seconds(longer)
    if first.text in seconds:
        span = Span(act.verb.span.source, act.verb.span.start, first.span.stop)
        return replace(act, verb=Word(f"{act.verb.text} {first.text}", span), items=act.items[1:])
    operation = vocabulary.lookup(act.verb.text)
    options = schema(operation) if operation is not None else ()
    own = [option.word for option in options] + [str(word) for option in options for word in option.choices]
    if first.text not in own and (operation is None or nearest(first.text, [*own, *seconds]) in seconds):
        said = f"{act.verb.text} takes no '{first.text}'"
        raise ProgramError.of(
            "S011", said, first.span, did_you_mean(first.text, seconds), f"verbs are {listed(longer, 'and')}"
        )
    return act


def _seconds(longer: Iterable[str]) -> list[str]:
    return [verb.partition(" ")[2] for verb in longer]


def _unfinished(verb: Word, longer: list[str]) -> ProgramError:
    return ProgramError.of(
        "S015",
        f"{verb.text} needs what",
        verb.span,
        f"expected {listed(_seconds(longer))}",
        f"verbs are {listed(longer, 'and')}",
    )


def _unknown(verb: Word, verbs: Iterable[str]) -> ProgramError:
    known = dict.fromkeys(name.partition(" ")[0] for name in verbs)
    return ProgramError.of(
        "S010",
        f"unknown verb '{verb.text}'",
        verb.span,
        did_you_mean(verb.text, known),
        f"verbs are {listed(sorted(known), 'and')}",
    )
