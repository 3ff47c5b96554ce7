"""Hypothesis strategies: syntax trees, selectors, operations and programs as values; their owners print them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from surgery.language.faults import RESERVED
from surgery.language.program import Program, Statement
from surgery.language.roles import ROLES, union
from surgery.language.selector import Difference, Glob, Intersection, Layers, Role, Selector
from surgery.language.source import NOWHERE
from surgery.language.texts import encode
from surgery.language.tree import (
    Act,
    Clause,
    Directive,
    Every,
    Group,
    Include,
    Joined,
    LayerRange,
    Let,
    Line,
    Literal,
    Selection,
    Tree,
    Word,
)
from surgery.operations import lookup
from surgery.operations.options import Form, Option, Payload, Ratio, Variant, schema

PRINTABLE = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=8)

# ---- syntax trees: any words, known or not

names = st.from_regex(r"[a-z_][a-z0-9_]{0,5}", fullmatch=True).filter(lambda name: name not in RESERVED | CLAUSES)
CLAUSES = frozenset(("on", "in", "except", "as", "expect", "even", "odd"))
words = st.builds(Word, names | st.sampled_from(ROLES) | st.builds("{}.{}".format, names, names))
integers = st.integers(-20, 200)
numbers = st.builds(Literal, st.just("number"), integers.map(str) | st.sampled_from(("0.5", "2e-4", "1E+3")))
values = st.one_of(
    numbers,
    st.builds(Literal, st.just("percent"), st.builds("{}%".format, integers)),
    st.builds(Literal, st.just("ratio"), st.builds("{}:{}".format, st.integers(0, 9), st.integers(0, 9))),
)
tables = st.builds(Literal, st.just("table"), st.lists(integers.map(str), min_size=2, max_size=4).map(", ".join))
texts = st.builds(Literal, st.just("text"), PRINTABLE.map(encode).filter(lambda text: "\r" not in text))
compares = st.builds(Literal, st.just("compare"), st.sampled_from(("<", "<=", ">", ">=", "==", "!=")))
ranges = st.integers(-9, 9).map(str) | st.builds("{}..{}".format, st.integers(-9, 9), st.integers(-9, 9))
layer_ranges = st.builds(LayerRange, ranges | st.sampled_from(("even", "odd")))
stacked = st.builds(LayerRange, ranges, words)
everies = st.builds(Every, words | st.just(Word("layers")))


def _joined(terms: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    after = terms | st.builds(LayerRange, ranges, st.none(), st.just(True)) | st.just(Word("in"))
    rest = st.lists(st.tuples(st.sampled_from("+,"), after), min_size=1, max_size=3).map(tuple)
    return st.builds(Joined, terms, rest)


def _grouped(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    cuts = st.lists(st.tuples(st.sampled_from(("in", "except")), inner), max_size=2).map(tuple)
    return st.builds(Group, inner, cuts)


def _selections(terms: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(terms | _joined(terms), lambda inner: _grouped(inner) | _joined(_grouped(inner)), max_leaves=4)


selections: st.SearchStrategy[Selection] = _selections(words | texts | everies | layer_ranges | stacked)
items: st.SearchStrategy[Selection] = st.one_of(
    words,
    values,
    tables,
    texts,
    compares,
    everies,
    layer_ranges,
    _joined(words | texts | everies),
    _grouped(selections),
)
clauses = st.one_of(
    st.builds(Clause, st.sampled_from(("on", "in", "except")), selections),
    st.builds(Clause, st.just("as"), words),
    st.builds(Clause, st.just("expect"), numbers | words),
)
acts = st.builds(
    Act,
    words,
    st.lists(items, max_size=5).map(tuple),
    st.lists(clauses, max_size=4).map(
        lambda drawn: tuple(sorted(drawn, key=lambda clause: ORDER.index(clause.keyword)))
    ),
)
ORDER = ("on", "in", "except", "as", "expect")
nodes = st.one_of(
    acts,
    st.builds(Let, words, words | values | tables | texts),
    st.builds(Include, texts),
    st.builds(Directive, st.sampled_from(("surgery", "seed")), numbers),
)
comments = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=10).map(
    lambda text: f"#{text}".rstrip()
)
lines = st.builds(Line, st.lists(nodes, max_size=2).map(tuple), st.none() | comments)
trees = st.builds(Tree, st.lists(lines, max_size=6).map(tuple))

# ---- selectors and programs that mean something

roles = st.builds(Role, st.sampled_from((*ROLES, "linear", "layers")))
globs = st.builds(Glob, PRINTABLE.filter(bool))
stacks = st.sampled_from((None, "encoder", "decoder", "stack2"))
spans = st.tuples(st.integers(-12, 12), st.integers(-12, 12)).map(
    lambda ends: ends if (ends[0] < 0) != (ends[1] < 0) else (min(ends), max(ends))
)
layers = (
    st.builds(lambda ends, stack: Layers(*ends, stack=stack), spans, stacks)
    | st.builds(lambda parity, stack: Layers(parity=parity, stack=stack), st.sampled_from(("even", "odd")), stacks)
    | st.sampled_from(("encoder", "decoder", "stack")).map(lambda stack: Layers(stack=stack))
)


def _unions(inner: st.SearchStrategy[Selector]) -> st.SearchStrategy[Selector]:
    return st.lists(inner, min_size=2, max_size=3).map(lambda parts: union(parts, NOWHERE))


selectors: st.SearchStrategy[Selector] = st.recursive(
    roles | globs | layers,
    lambda inner: _unions(inner) | st.builds(Intersection, inner, inner) | st.builds(Difference, inner, inner),
    max_leaves=6,
)


def _within(low: float | None, above: float | None, high: float | None, below: float | None) -> Callable[[float], bool]:
    return lambda value: (
        (low is None or value >= low)
        and (above is None or value > above)
        and (high is None or value <= high)
        and (below is None or value < below)
    )


def _written(form: Form, limits: Option | Payload) -> st.SearchStrategy[Any]:
    inside = _within(limits.at_least, limits.above, limits.at_most, limits.below)
    if form == "count":
        return st.integers(0, 600).filter(inside)
    if form == "number":
        return st.floats(1e-8, 1e8).filter(inside)
    if form in ("counts", "numbers"):
        single: Form = "count" if form == "counts" else "number"
        return st.lists(_written(single, limits), min_size=2, max_size=4).map(tuple)
    if form == "share":
        return st.floats(0, 1).filter(inside)
    if form == "ratio":
        return st.integers(2, 16).flatmap(lambda whole: st.builds(Ratio, st.integers(1, whole - 1), st.just(whole)))
    if form == "text":
        return PRINTABLE.filter(bool)
    if form == "selection":
        return selectors
    if form == "word":
        return names
    raise NotImplementedError(form)


def _option(option: Option, said: set[str]) -> st.SearchStrategy[Any]:
    if option.place == "flag":
        return st.booleans()
    if "variant" in option.forms:
        carried = [
            st.just(str(word) if "word" in option.forms else Variant(str(word)))
            if held is None
            else st.builds(Variant, st.just(str(word)), _written(held.form, held))
            for word, held in option.choices.items()
        ]
        return st.one_of(carried)
    if option.choices:
        return st.sampled_from(list(option.choices))
    drawn = st.one_of([_written(form, option) for form in option.forms if form != "file"])
    return drawn.filter(lambda value: value not in said)


def operations(verb: str) -> st.SearchStrategy[Any]:
    """Operations of a verb with any of its options; those that exclude each other are filtered out."""
    found = lookup(verb)
    assert found is not None
    options = [option for option in schema(found) if option.forms != ("file",)]
    said = {option.word for option in options}
    fixed = {option.name: _option(option, said) for option in options if option.required}
    free = {option.name: _option(option, said) for option in options if not option.required}
    return (
        st.fixed_dictionaries(fixed, optional=free)
        .map(lambda drawn: found(**drawn))
        .filter(lambda operation: not list(operation.validate()))
    )


def statements(*verbs: str) -> st.SearchStrategy[Statement]:
    """Statements of these verbs on any selectors."""
    drawn = st.one_of([operations(verb) for verb in verbs])
    return st.builds(Statement, drawn, selectors, st.none() | names, st.none() | st.integers(1, 99))


def programs(*verbs: str) -> st.SearchStrategy[Program]:
    """Programs of up to five statements."""
    found = st.lists(statements(*verbs), max_size=5).map(tuple)
    return st.builds(Program, found, seed=st.integers(0, 10**6))


__all__ = ["operations", "programs", "selectors", "statements", "trees"]
