"""Selectors as written to selectors as values: the roles there are, siblings after a comma, ranges of layers."""

from __future__ import annotations

import re
from collections.abc import Iterable

from surgery.errors import Diagnostic, ProgramError
from surgery.language.selector import Difference, Glob, Intersection, Layers, Role, Selector, Union
from surgery.language.source import Span
from surgery.language.suggest import did_you_mean, listed
from surgery.language.texts import decode
from surgery.language.tree import Every, Group, Joined, LayerRange, Literal, Selection, Word

PARTS: dict[str, tuple[str, ...]] = {
    "attn": ("q", "k", "v", "o"),
    "cross": ("q", "k", "v", "o"),
    "ffn": ("up", "gate", "down"),
    "mixer": ("in", "out"),
    "embed": (),
    "position": (),
    "norm": (),
    "head": (),
    "router": (),
    "experts": (),
    "base": (),
    "bias": (),
}
ROLES = tuple(name for role, parts in PARTS.items() for name in (role, *(f"{role}.{part}" for part in parts)))
KNOWN = f"roles are {listed(PARTS, 'and')}; also `all linear`, `all layers`, `layers 0..3`, or a quoted module path"
WHOLES = ("linear", "layers")
STACKS = ("encoder", "decoder", "stack")
RANGE = re.compile(r"(-?\d+)(?:\.\.(-?\d+))?")
FARTHEST = 1_000_000


def is_stack(name: str) -> bool:
    """`encoder`, `decoder`, `stack`, `stack2`."""
    return name in STACKS or re.fullmatch(r"stack\d+", name) is not None


def names_parts(name: str) -> bool:
    """Whether a word is a role or a stack."""
    return name in ROLES or is_stack(name)


def is_sibling(before: str, name: str) -> bool:
    """Whether `name` after a comma is a part beside `before`: `v` in `attn.q,v`."""
    parent, dot, _ = before.rpartition(".")
    return bool(dot) and name in PARTS.get(parent, ())


def resolve(term: Selection) -> Selector:
    """The selector that a selection means. Raises ProgramError (S020, S021, S022) at the place that is wrong."""
    if isinstance(term, Word):
        return _role(term)
    if isinstance(term, Literal):
        return _glob(term)
    if isinstance(term, Every):
        return _every(term)
    if isinstance(term, LayerRange):
        return _layers(term)
    if isinstance(term, Group):
        return _group(term)
    return _join(term)


def _role(word: Word, before: str = "") -> Selector:
    name = word.text
    if is_stack(name):
        return Layers(stack=name, span=word.span)
    if name in ROLES:
        return Role(name, word.span)
    parent, dot, part = name.rpartition(".")
    parts = PARTS.get(parent)
    if parts:
        raise _unknown(f"'{parent}' has no part '{part}'", word, f"{parent} has {listed(parts, 'and')}", part, parts)
    if name in WHOLES:
        raise _unknown(f"'{name}' is selected with `all`", word, f"write `all {name}`")
    owners = [role for role, parts in PARTS.items() if name in parts]
    near = before.rpartition(".")[0]
    if owners:
        raise _unknown(f"unknown role '{name}'", word, f"write `{near if near in owners else owners[0]}.{name}`")
    if near and not dot and did_you_mean(name, ROLES) == "":
        raise _unknown(f"unknown role '{name}'", word, f"parts of {near} are {listed(PARTS[near], 'and')}")
    raise _unknown(f"unknown role '{name}'", word, KNOWN, "", (*ROLES, *STACKS, *WHOLES))


def _unknown(message: str, word: Word, help: str, meant: str = "", known: Iterable[str] = ()) -> ProgramError:
    return ProgramError(Diagnostic("S020", message, word.span, did_you_mean(meant or word.text, known), help))


def _glob(literal: Literal) -> Glob:
    if literal.form != "text":
        raise ProgramError.of("S021", f"'{literal.text}' selects nothing", literal.span, "expected a selector")
    pattern = decode(literal)
    if not pattern:
        raise ProgramError.of("S021", "an empty path selects nothing", literal.span, "expected a module path")
    return Glob(pattern, literal.span)


def _every(every: Every) -> Role:
    if every.word.text in WHOLES:
        return Role(every.word.text, every.span)
    if every.word.text in ROLES:
        raise ProgramError.of(
            "S021", f"'{every.word.text}' goes without `all`", every.span, f"write `{every.word.text}`"
        )
    raise ProgramError(
        Diagnostic(
            "S020",
            f"unknown selector 'all {every.word.text}'",
            every.word.span,
            did_you_mean(every.word.text, WHOLES),
            "after `all` comes linear or layers",
        )
    )


def _layers(layers: LayerRange, stack: str | None = None) -> Layers:
    if layers.stack is not None:
        stack = layers.stack.text
        if not is_stack(stack):
            raise ProgramError(
                Diagnostic(
                    "S020",
                    f"unknown stack '{stack}'",
                    layers.stack.span,
                    did_you_mean(stack, STACKS),
                    "stacks of layers are called encoder, decoder, or stack, stack2, ... where a model has neither",
                )
            )
    if layers.range in ("even", "odd"):
        return Layers(parity=layers.range, stack=stack, span=layers.span)
    match = RANGE.fullmatch(layers.range)
    if match is None:
        raise ProgramError.of(
            "S022", f"'{layers.range}' is no layer", layers.span, "expected a whole number or a range"
        )
    # More digits than Python converts at once are out of range anyway.
    numbers = [FARTHEST if len(digits) > 8 else int(digits) for digits in (match[1], match[2] or match[1])]
    first, last = numbers
    if max(abs(first), abs(last)) >= FARTHEST:
        raise ProgramError.of("S022", "no model has that many layers", layers.span)
    if first > last and (first < 0) == (last < 0):
        raise ProgramError.of(
            "S022", f"the range {first}..{last} is empty", layers.span, f"write {last}..{first}; both ends belong to it"
        )
    return Layers(first, last, stack=stack, span=layers.span)


def _group(group: Group) -> Selector:
    selector = resolve(group.first)
    for keyword, cut in group.cuts:
        combine = Intersection if keyword == "in" else Difference
        selector = combine(selector, resolve(cut), group.span)
    return selector


def _join(joined: Joined) -> Selector:
    selectors = [resolve(joined.first)]
    faults: list[Diagnostic] = []
    for separator, term in joined.rest:
        try:
            selectors.append(_next(selectors[-1], separator, term))
        except ProgramError as error:
            faults += error.diagnostics
    if faults:
        raise ProgramError(*faults)
    return union(selectors, joined.span)


def _next(before: Selector, separator: str, term: Selection) -> Selector:
    if isinstance(term, Word):
        previous = before.name if isinstance(before, Role) else ""
        if separator == "," and is_sibling(previous, term.text):
            return Role(f"{previous.rpartition('.')[0]}.{term.text}", term.span)
        return _role(term, previous)
    if isinstance(term, LayerRange) and term.bare:
        if separator == "," and isinstance(before, Layers):
            return _layers(term, before.stack)
        raise ProgramError.of("S022", f"'{term.range}' is no layer here", term.span, f"write `layers {term.range}`")
    return resolve(term)


def union(selectors: list[Selector], span: Span) -> Selector:
    """The union, flat; of one selector, itself."""
    flat = [item for selector in selectors for item in (selector.items if isinstance(selector, Union) else (selector,))]
    return flat[0] if len(flat) == 1 else Union(tuple(flat), span)
