"""Values back to text: operations, selectors, statements, in the one form the parser reads back to the same value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from surgery.language.program import Statement
from surgery.language.roles import is_sibling, union
from surgery.language.selector import Difference, Glob, Intersection, Layers, Role, Selector, Union
from surgery.language.texts import encode
from surgery.language.values import number_text, percent
from surgery.operations.base import Operation
from surgery.operations.options import Comparison, Option, SameAs, Variant, schema

PLACES = {"kind": 0, "quantity": 1, "option": 2, "flag": 2}


def statement_text(statement: Statement) -> str:
    """`quantize base nf4 double`: what it acts on in front where the verb takes it there, else after `on`."""
    operation = statement.operation
    words = _words(operation)
    chosen = [getattr(operation, name) for name in operation.selecting]
    said = union([selector for selector in chosen if selector is not None], statement.span) if any(chosen) else None
    whole, scope, cut = _clauses(statement.selector, said)
    tail: list[str] = []
    if whole == Union(()) or operation.selecting:
        pass
    elif operation.leads and _may_lead(whole, words):
        words = [selector_text(whole), *words]
    else:
        tail.append(f"on {selector_text(whole)}")
    tail += [
        f"{keyword} {selector_text(part)}" for keyword, part in (("in", scope), ("except", cut)) if part is not None
    ]
    tail += [f"as {statement.name}"] if statement.name is not None else []
    tail += [f"expect {statement.expect}"] if statement.expect is not None else []
    return " ".join([operation.verb, *words, *tail])


def operation_text(operation: Operation) -> str:
    """The verb with its kind, its quantity, and every option that is not at its default."""
    return " ".join([operation.verb, *_words(operation)])


def selector_text(selector: Selector) -> str:
    """A selector as it stands after `on`; a scope or a cut inside it in parentheses."""
    if isinstance(selector, Role):
        return f"all {selector.name}" if selector.name in ("linear", "layers") else selector.name
    if isinstance(selector, Glob):
        return encode(selector.pattern)
    if isinstance(selector, Layers):
        return _layers_text(selector)
    if isinstance(selector, Union):
        return _union_text(selector)
    return f"({_nested_text(selector)})"


def layers_range(layers: Layers) -> str:
    """`0..3`, `7`, `even`, or nothing for every layer."""
    if layers.parity is not None:
        return layers.parity
    if layers.first is None:
        return ""
    return str(layers.first) if layers.last in (layers.first, None) else f"{layers.first}..{layers.last}"


def value_text(value: Any, option: Option) -> str:
    """An option's value."""
    if isinstance(value, Variant):
        carried = option.choices.get(value.word)
        form = carried.form if carried is not None else "word"
        return value.word if value.value is None else f"{value.word} {_scalar(value.value, form)}"
    return _scalar(value, _form(value, option))


def _words(operation: Operation) -> list[str]:
    words: list[str] = []
    for option in sorted(schema(type(operation)), key=lambda option: PLACES[option.place]):
        value = getattr(operation, option.name)
        default = option.default
        if isinstance(default, SameAs):
            default = getattr(operation, default.field)
        if value == default:
            continue
        if option.place == "flag":
            words.append(option.word)
            continue
        text = value_text(value, option)
        unit = f" {option.unit}" if option.unit and _form(value, option) != "share" else ""
        words.append(f"{option.word} {text}{unit}" if option.place == "option" else f"{text}{unit}")
    return words


def _form(value: Any, option: Option) -> str:
    """Which of an option's forms a value was read as."""
    types = {"count": int, "number": float, "share": float, "file": Path, "counts": tuple, "numbers": tuple}
    for form in option.forms:
        if form in types and isinstance(value, types[form]):
            return form
    return option.forms[0]


def _scalar(value: Any, form: str) -> str:
    if form == "share" and isinstance(value, (int, float)):
        return percent(float(value))
    if form in ("text", "file"):
        return encode(str(value))
    if form == "selection":
        text = selector_text(value)
        plain = all(isinstance(item, Role) for item in (value.items if isinstance(value, Union) else (value,)))
        return text if plain or isinstance(value, (Intersection, Difference)) else f"({text})"
    if form in ("counts", "numbers"):
        return ", ".join(map(number_text, value))
    if isinstance(value, Comparison):
        return _comparison_text(value)
    return number_text(value) if isinstance(value, (int, float)) else str(value)


def _comparison_text(comparison: Comparison) -> str:
    bound = percent(comparison.bound) if comparison.unit == "%" else number_text(comparison.bound)
    unit = f" {comparison.unit}" if comparison.unit not in ("", "%") else ""
    return f"{comparison.relation} {bound}{unit}" + (f" of {comparison.of}" if comparison.of else "")


def _clauses(selector: Selector, said: Selector | None = None) -> tuple[Selector, Selector | None, Selector | None]:
    """The whole, its scope and its cut. said: the whole, where options say it."""
    cut: Selector | None = None
    if isinstance(selector, Difference) and selector != said:
        cut = selector.cut
        selector = selector.whole
    if isinstance(selector, Intersection) and selector != said:
        return selector.whole, selector.scope, cut
    return selector, None, cut


def _may_lead(whole: Selector, words: list[str]) -> bool:
    """Whether a selector in front is read as one; roles are, unless the verb has a word of the same name."""
    roles = whole.items if isinstance(whole, Union) else (whole,)
    said = {word for text in words for word in text.split()}
    return all(isinstance(role, Role) and role.name not in said for role in roles)


def _layers_text(layers: Layers) -> str:
    text = layers_range(layers)
    if not text:
        return layers.stack or "all layers"
    return f"{layers.stack} layers {text}" if layers.stack else f"layers {text}"


def _union_text(union: Union) -> str:
    text = ""
    before: Selector | None = None
    for item in union.items:
        if isinstance(before, Role) and isinstance(item, Role) and _siblings(before.name, item.name):
            text += f",{item.name.rpartition('.')[2]}"
        else:
            text += f" + {selector_text(item)}" if text else selector_text(item)
        before = item
    return text


def _siblings(before: str, name: str) -> bool:
    parent, _, part = name.rpartition(".")
    return bool(parent) and before.rpartition(".")[0] == parent and is_sibling(before, part)


def _nested_text(selector: Selector) -> str:
    """Scopes and cuts from left to right, as the grammar reads them."""
    if isinstance(selector, Intersection):
        return f"{_nested_text(selector.whole)} in {selector_text(selector.scope)}"
    if isinstance(selector, Difference):
        return f"{_nested_text(selector.whole)} except {selector_text(selector.cut)}"
    return selector_text(selector)
