"""A statement's words against its verb's schema: every option typed, checked and placed, every fault with its span."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.errors import Diagnostic, ProgramError
from surgery.language import comparisons
from surgery.language.clauses import Clauses
from surgery.language.program import Statement
from surgery.language.roles import is_stack, names_parts, resolve, union
from surgery.language.selector import Selector, Union
from surgery.language.source import Span
from surgery.language.suggest import did_you_mean, listed, nearest
from surgery.language.syntax import MOST_FAULTS
from surgery.language.tree import Act, Every, Group, Joined, LayerRange, Literal, Selection, Word
from surgery.language.values import Limits, convert, moved, wanted
from surgery.language.verbs import recognise
from surgery.language.wording import described, expected, short, usage, worded
from surgery.operations import Vocabulary
from surgery.operations.base import Operation
from surgery.operations.options import Option, Payload, Variant, schema

NOTHING = Union(())


@dataclass(frozen=True)
class Context:
    """What surrounds a statement: the verbs there are, the values of `let` names, where its paths start from."""

    vocabulary: Vocabulary

    values: Mapping[str, Word | Literal] = field(default_factory=dict)
    directory: Path | None = None


def bind(act: Act, context: Context) -> Statement:
    """The statement that was written. Raises ProgramError with everything that is wrong with it."""
    act, operation = recognise(act, context.vocabulary)
    return _Binder(act, operation, context).statement()


class _Binder:
    """Walks one statement from left to right; `at` is the next item."""

    def __init__(self, act: Act, operation: type[Operation], context: Context) -> None:
        self.act = act
        self.operation = operation
        self.context = context
        self.options = schema(operation)
        self.named = {option.word: option for option in self.options if option.place in ("option", "flag")}
        self.kinds = [option for option in self.options if option.place == "kind"]
        self.quantities = [option for option in self.options if option.place == "quantity"]
        self.values: dict[str, Any] = {}
        self.places: dict[str, Span] = {}
        self.attempted: set[str] = set()  # options that were written, rightly or not: no second complaint about them
        self.faults: list[Diagnostic] = []
        self.leading: Selector | None = None
        self.items = list(act.items)
        self.at = 0

    def statement(self) -> Statement:
        self.attempt(self.lead)
        while self.at < len(self.items) and len(self.faults) < MOST_FAULTS:
            self.attempt(self.item)
        clauses = Clauses(self.act, self.operation, self.context.values, self.faults)
        selector, name, expect = clauses.selector(self.leading or self.selected()), clauses.name(), clauses.expect()
        self.missing()
        operation = self.build() if not self.faults else None
        if operation is not None and name is not None and not operation.nameable:
            said = f"{self.act.verb.text} attaches nothing here that a name could switch"
            self.faults.append(Diagnostic("S017", said, clauses.written["as"].span, "", f"leave `as {name}` out"))
        if operation is None or self.faults:
            raise ProgramError(*self.faults)
        return Statement(operation, selector or NOTHING, name, expect, self.act.span, self.places)

    def attempt(self, step: Any) -> None:
        try:
            step()
        except ProgramError as error:
            self.faults += error.diagnostics

    # ---- items

    def lead(self) -> None:
        """A selector right after the verb, where the verb takes one there."""
        if not self.items or not self.operation.leads:
            return
        first = self.items[0]
        if isinstance(first, Word):
            following = self.items[1] if len(self.items) > 1 else None
            if is_stack(first.text) and isinstance(following, LayerRange):
                self.at = 2
                self.leading = resolve(LayerRange(following.range, first, span=following.span))
                return
            if self.says(first.text) or not (names_parts(first.text) or "." in first.text):
                return
        elif isinstance(first, Literal) and (first.form != "text" or any("text" in q.forms for q in self.quantities)):
            return
        self.at = 1
        self.leading = resolve(first)

    def says(self, word: str) -> bool:
        """Whether a bare word means something to this verb."""
        return word in self.named or any(word in option.choices for option in self.kinds)

    def item(self) -> None:
        item = self.items[self.at]
        self.at += 1
        if isinstance(item, Word) and not self.says(item.text):
            item = self.context.values.get(item.text, item)
        if isinstance(item, Literal):
            self.quantity(item, self.items[self.at - 1].span)
        elif not isinstance(item, Word) or "." in item.text:
            self.misplaced(item)
        elif item.text in self.named:
            self.option(self.named[item.text], item)
        else:
            self.kind(item)

    def option(self, option: Option, word: Word) -> None:
        self.attempted.add(option.name)
        if option.name in self.places:
            if option.place != "flag":
                self.at += isinstance(self.peek(), Literal)
            raise ProgramError.of("S016", f"'{option.word}' is said twice", word.span, "remove one of them")
        self.places[option.name] = word.span
        if option.place == "flag":
            self.values[option.name] = True
            return
        try:
            value, span = self.option_value(option, word)
        finally:
            self.unit(option)  # of a wrong value too: one fault
        self.values[option.name] = value
        self.places[option.name] = Span(span.source, word.span.start, span.stop)

    def kind(self, word: Word) -> None:
        for option in self.kinds:
            if word.text in option.choices:
                if option.name in self.values:
                    before = self.values[option.name]
                    raise ProgramError.of(
                        "S016", f"'{word.text}' besides '{before}'", word.span, "only one of them can be meant"
                    )
                self.values[option.name] = word.text
                self.places[option.name] = word.span
                return
        raise self.unknown(word)

    def quantity(self, literal: Literal, span: Span) -> None:
        compared = next((option for option in self.quantities if option.bounds), None)
        if compared is not None:
            self.comparison(compared, moved(literal, span))
            return
        if literal.form == "compare":
            self.at += isinstance(self.peek(), Literal)
            raise ProgramError.of("S011", f"{self.act.verb.text} has no use for a comparison", span)
        free = [option for option in self.quantities if option.name not in self.attempted]
        if not free:
            help = f"options that take a value: {listed(self.valued(), 'and')}" if self.valued() else ""
            raise ProgramError.of(
                "S011",
                f"{self.act.verb.text} has no use for '{short(literal.text)}' here",
                span,
                "which option is it?",
                help,
            )
        option = free[0]
        self.attempted.add(option.name)
        self.places[option.name] = span
        self.values[option.name] = convert(
            moved(literal, span),
            Limits.of(f"{option.word} of {self.act.verb.text}", option),
            self.context.directory,
        )
        self.unit(option)

    def comparison(self, option: Option, first: Literal) -> None:
        words = self.items[self.at : self.at + comparisons.WORDS]
        self.at += comparisons.length(first, words, self.named)
        if option.name in self.attempted:
            raise ProgramError.of("S016", "a second comparison", first.span, "write a statement for each")
        self.attempted.add(option.name)
        read = comparisons.read(first, words, option, self.act.verb.text, self.context.values)
        self.values[option.name], self.places[option.name] = read

    def unit(self, option: Option) -> None:
        following = self.peek()
        if (
            option.unit
            and isinstance(following, Word)
            and following.text in (option.unit, option.unit.removesuffix("s"))
        ):
            self.at += 1

    def misplaced(self, item: Selection) -> None:
        text = item.span.text
        selector = isinstance(item, (Joined, Every, LayerRange, Group)) or (
            isinstance(item, Word) and names_parts(item.text)
        )
        if selector or isinstance(item, Word):
            raise ProgramError.of(
                "S019",
                f"'{short(text)}' stands where options do",
                item.span,
                "a selector?",
                f"write `on {short(text)}` at the end",
            )
        raise ProgramError.of("S011", f"{self.act.verb.text} has no use for '{short(text)}'", item.span)

    def unknown(self, word: Word) -> ProgramError:
        verb = self.act.verb.text
        words = [*self.named, *(choice for option in self.kinds for choice in option.choices)]
        known = [
            *words,
            *self.context.values,
            *(["base", "attn", "ffn", "norm", "head", "embed"] if self.operation.leads else []),
        ]
        guess = nearest(word.text, known)
        if guess in self.named:
            self.attempted.add(self.named[guess].name)
        for option in self.kinds:
            if guess in option.choices:
                self.attempted.add(option.name)
        following = self.peek()
        valued = isinstance(following, Literal) and not (self.quantities and self.quantities[0].name not in self.values)
        self.at += bool(
            valued or (guess in self.named and self.named[guess].place == "option" and following is not None)
        )
        if guess is None and names_parts(word.text):
            return ProgramError.of(
                "S019",
                f"'{word.text}' stands where options do",
                word.span,
                "a selector?",
                f"write `on {word.text}` at the end",
            )
        said = f"{verb} takes {listed(dict.fromkeys(words), 'and')}" if words else f"{verb} takes no options"
        return ProgramError.of(
            "S011", f"unknown option '{word.text}' for {verb}", word.span, did_you_mean(word.text, known), said
        )

    # ---- values of named options

    def option_value(self, option: Option, word: Word) -> tuple[Any, Span]:
        item = self.peek()
        if item is None or (isinstance(item, Word) and not self.takes(option, item)):
            if isinstance(item, Word) and (item.text in self.named or not worded(option)):
                item = None
            if item is None:
                raise ProgramError.of(
                    "S014", f"'{option.word}' has no value", word.span, f"expected {expected(option)}", usage(option)
                )
        self.at += 1
        span = item.span
        if isinstance(item, Word) and item.text not in option.choices and item.text in self.context.values:
            item = self.context.values[item.text]
        if "selection" in option.forms:
            return resolve(item), span
        if isinstance(item, Word):
            return self.worded(option, item, span)
        if not isinstance(item, Literal):
            raise ProgramError.of(
                "S012", f"'{option.word}' cannot be '{short(item.span.text)}'", span, f"expected {expected(option)}"
            )
        if all(form in ("word", "variant") for form in option.forms):
            raise ProgramError.of(
                "S012", f"'{option.word}' cannot be {short(item.text)}", span, f"expected {expected(option)}"
            )
        if item.form == "compare":
            self.at += isinstance(self.peek(), Literal)
        value = convert(moved(item, span), Limits.of(f"'{option.word}'", option), self.context.directory)
        if option.choices and "variant" not in option.forms and value not in option.choices:
            raise ProgramError.of(
                "S013", f"'{option.word}' cannot be {item.text}", span, f"expected {expected(option)}"
            )
        return value, span

    def takes(self, option: Option, word: Word) -> bool:
        """Whether a word can be the value of an option: one of its choices, or a name with a value."""
        if word.text in option.choices or word.text in self.context.values or "selection" in option.forms:
            return True
        return "word" in option.forms and not option.choices and word.text not in self.named

    def worded(self, option: Option, word: Word, span: Span) -> tuple[Any, Span]:
        if word.text not in option.choices and (option.choices or "word" not in option.forms):
            raise ProgramError.of(
                "S012",
                f"'{option.word}' cannot be '{word.text}'",
                span,
                did_you_mean(word.text, map(str, option.choices)),
                f"expected {expected(option)}",
            )
        if "variant" not in option.forms:
            return word.text, span
        carried = option.choices[word.text]
        if carried is None:
            return (word.text if "word" in option.forms else Variant(word.text)), span
        return self.carried(option, word, carried)

    def carried(self, option: Option, word: Word, payload: Payload) -> tuple[Variant, Span]:
        item = self.peek()
        said = item
        if isinstance(item, Word) and not self.says(item.text):
            said = self.context.values.get(item.text, item)
        if isinstance(item, (Word, Literal)) and isinstance(said, Literal):
            self.at += 1
            limits = Limits.of(f"'{option.word} {word.text}'", payload)
            return Variant(word.text, convert(moved(said, item.span), limits, self.context.directory)), item.span
        default = Option("", "option", "", (payload.form,), payload.default)
        if default.required:
            raise ProgramError.of(
                "S014", f"'{option.word} {word.text}' has no value", word.span, f"expected {wanted((payload.form,))}"
            )
        return Variant(word.text, payload.default), word.span

    def peek(self) -> Selection | None:
        return self.items[self.at] if self.at < len(self.items) else None

    def valued(self) -> list[str]:
        return [word for word, option in self.named.items() if option.place == "option"]

    # ---- the whole

    def selected(self) -> Selector | None:
        """What the options say that stand for `on`."""
        said = [self.values[name] for name in self.operation.selecting if name in self.values]
        return union(said, self.act.span) if said else None

    def missing(self) -> None:
        choice = [option for option in self.options if option.name in self.operation.one_of]
        if choice and not any(option.name in self.values or option.name in self.attempted for option in choice):
            names = " or ".join(described(option) for option in choice)
            self.faults.append(
                Diagnostic(
                    "S015",
                    f"{self.act.verb.text} needs {names}",
                    self.act.verb.span,
                    f"expected {names}",
                    f"{usage(choice[0])}: {choice[0].help}",
                )
            )
        for option in self.options:
            if option.required and option.name not in self.values and option.name not in self.attempted:
                self.faults.append(
                    Diagnostic(
                        "S015",
                        f"{self.act.verb.text} needs {described(option)}",
                        self.act.verb.span,
                        f"expected {expected(option)}",
                        f"{usage(option)}: {option.help}" if option.place == "option" else option.help,
                    )
                )

    def build(self) -> Operation | None:
        operation = self.operation(**self.values)
        for name, message, help in operation.validate():
            self.faults.append(Diagnostic("S017", message, self.places.get(name, self.act.verb.span), "", help))
        return operation
