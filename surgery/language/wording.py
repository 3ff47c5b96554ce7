"""What an option takes, in words, for errors and for the reference."""

from __future__ import annotations

from surgery.language.suggest import listed
from surgery.language.values import wanted
from surgery.operations.options import Option

SAMPLES = {
    "count": "8",
    "counts": "4, 8",
    "numbers": "8, 16",
    "number": "0.5",
    "share": "5%",
    "ratio": "2:4",
    "text": '"..."',
    "file": '"..."',
}


def expected(option: Option) -> str:
    """`a whole number, such as 8`, or the choices."""
    if option.bounds:
        return f"a comparison, such as {sample(option)}" + (f", or <= 1.05 of {option.of[0]}" if option.of else "")
    free = tuple(form for form in option.forms if form not in ("word", "variant"))
    if not option.choices:
        return wanted(option.forms)
    return (
        f"{wanted(free)}, or {listed(option.choices)}" if free and "variant" in option.forms else listed(option.choices)
    )


def described(option: Option) -> str:
    """How a missing option is called."""
    if option.place == "option":
        return f"'{option.word}'"
    return f"{'an' if option.word[0] in 'aeiou' else 'a'} {option.word}"


def sample(option: Option) -> str:
    """A comparison as the option takes it: `< 200 MB`."""
    return {"share": "< 1%", "size": "< 200 MB"}.get(option.bounds[0], "<= 20")


def usage(option: Option) -> str:
    """`write `rank 8``."""
    sample = str(next(iter(option.choices))) if option.choices else SAMPLES.get(option.forms[0], "ffn")
    return f"write `{option.word} {sample}`"


def worded(option: Option) -> bool:
    """Whether the value may be a bare word."""
    return any(form in ("word", "variant", "selection") for form in option.forms)


def short(text: str) -> str:
    """At most 40 characters, for messages."""
    return text if len(text) <= 40 else f"{text[:37]}..."
