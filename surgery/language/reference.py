"""The language reference: the syntax as written by hand, then a section per verb out of its own schema."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping

from surgery.errors import Diagnostic, ProgramError
from surgery.language.data import grammar_file
from surgery.language.pairs import table
from surgery.language.source import Source, Span
from surgery.language.suggest import did_you_mean, listed
from surgery.language.values import number_text
from surgery.language.write import selector_text, value_text
from surgery.operations import lookup, verbs
from surgery.operations.base import Operation
from surgery.operations.options import Form, Option, Payload, SameAs, schema

PAIRS = """## Pairs

Which two statements may act on one place: `+` yes, `as` when one of them has a name (`as NAME`), `-` never. A pair that
is refused is an error that names both. On different places every pair is legal.
"""
MARKER = "<!-- From here on generated: surgery reference --write grammar/README.md -->\n"
SHOWN: Mapping[Form, str] = {
    "count": "N",
    "number": "X",
    "counts": "N, N, ...",
    "numbers": "X, X, ...",
    "share": "P%",
    "ratio": "N:M",
    "word": "WORD",
    "text": '"TEXT"',
    "file": '"PATH"',
    "variant": "WORD",
    "selection": "SELECTOR",
    "size": "X MB",
    "comparison": "COMPARISON",
}


def reference(head: str | None, chosen: Iterable[str]) -> str:
    """The whole page; `head` None: the one in grammar/README.md."""
    if head is None:
        head = grammar_file("README.md").partition(MARKER)[0]
    verbs = sorted(chosen)
    return head + MARKER + "\n## Verbs\n\n" + "\n\n".join(map(_section, verbs)) + f"\n\n{PAIRS}\n{table(verbs)}\n"


def _section(verb: str) -> str:
    """A verb of a broken package must not hide the others."""
    try:
        return verb_section(verb, "###")
    except ProgramError as error:
        return f"### {verb}\n\n{error.diagnostics[0].message}"


def verb_section(verb: str, heading: str = "##") -> str:
    """One verb in Markdown: synopsis, what it is, its options. Raises ProgramError (S010) when there is none."""
    operation = lookup(verb)
    if operation is None:
        span = Span(Source("verb", verb), 0, len(verb))
        raise ProgramError(Diagnostic("S010", f"unknown verb '{verb}'", span, did_you_mean(verb, verbs())))
    options = schema(operation)
    rows = [f"- `{_term(option)}`: {_meaning(option)}{_default(option)}" for option in options]
    return "\n".join(
        [
            f"{heading} {verb}",
            "",
            "```",
            synopsis(operation),
            "```",
            "",
            *(line.rstrip() for line in (inspect.getdoc(operation) or "").splitlines()),
            "",
            *rows,
            *([""] if rows else []),
            _acting(operation),
        ]
    )


def synopsis(operation: type[Operation]) -> str:
    """`lora rank N [alpha X] ... on SELECTOR`."""
    by_place = {"kind": 0, "quantity": 1, "option": 2, "flag": 3}
    options = sorted(schema(operation), key=lambda option: (by_place[option.place], not option.required))
    words = [_term(option) if option.required else f"[{_term(option)}]" for option in options]
    if operation.leads:
        return " ".join([operation.verb, "[SELECTOR]", *words])
    if operation.selecting:
        return " ".join([operation.verb, *words])
    target = "" if not operation.acts_on else "on SELECTOR" if operation.default_selector is None else "[on SELECTOR]"
    return " ".join(filter(None, [operation.verb, *words, target]))


def _acting(operation: type[Operation]) -> str:
    acts = f"Acts on: {listed(operation.acts_on, 'and')}. " if operation.acts_on else ""
    default = operation.default_selector
    target = f"Without a selector: `{selector_text(default)}`. " if default is not None else ""
    return f"{acts}{target}Phase: {operation.phase}."


def _term(option: Option) -> str:
    if option.place == "flag":
        return option.word
    if option.place == "kind":
        return "|".join(option.choices)
    if option.bounds:
        bound = "|".join(SHOWN[form] for form in option.bounds)
        return f"<|<=|>|>=|==|!= {bound}" + "".join(f"|X of {word}|P% of {word}" for word in option.of)
    unit = f" {option.unit}" if option.unit else ""
    free = [SHOWN[form] for form in option.forms if form not in ("word", "variant") or not option.choices]
    written = "|".join([*(free if "variant" in option.forms or not option.choices else ()), *_choices(option)])
    return f"{written}{unit}" if option.place == "quantity" else f"{option.word} {written}{unit}"


def _choices(option: Option) -> list[str]:
    return [f"{word} {_carried(carried)}" if carried else str(word) for word, carried in option.choices.items()]


def _carried(carried: Payload) -> str:
    shown = SHOWN[carried.form]
    return shown if Option("", "option", "", (), carried.default).required else f"[{shown}]"


def _meaning(option: Option) -> str:
    if option.bounds:
        return option.help
    share = "share" in option.forms
    bounds = [
        ("at least", option.at_least),
        ("more than", option.above),
        ("at most", option.at_most),
        ("less than", option.below),
    ]
    said = [f"{word} {number_text(float(bound), share)}" for word, bound in bounds if bound is not None]
    carried = [
        f"`{word}` {number_text(carried.default)}"
        for word, carried in option.choices.items()
        if carried is not None and isinstance(carried.default, (int, float))
    ]
    defaults = f"; {', '.join(carried)} unless said" if carried else ""
    return option.help + (f"; {' and '.join(said)}" if said else "") + defaults


def _default(option: Option) -> str:
    if option.required:
        return " (required)"
    if option.place == "flag" or option.default is None:
        return ""
    if isinstance(option.default, SameAs):
        return f" (default: the same as `{option.default.field}`)"
    return f" (default: `{value_text(option.default, option)}`)"
