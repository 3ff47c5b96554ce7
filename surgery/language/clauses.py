"""What follows a statement's options: where it acts, what it is called, how many places it expects."""

from __future__ import annotations

from collections.abc import Mapping

from surgery.errors import Diagnostic, ProgramError
from surgery.language.roles import resolve
from surgery.language.selector import Difference, Intersection, Selector
from surgery.language.suggest import listed
from surgery.language.tree import Act, Clause, Literal, Selection, Word
from surgery.language.values import Limits, convert, moved, wanted
from surgery.language.wording import short
from surgery.operations.base import Operation


class Clauses:
    """The clauses of one statement, each `written` once. faults: where what is wrong with them is noted.

    values: of `let` names.
    """

    def __init__(
        self,
        act: Act,
        operation: type[Operation],
        values: Mapping[str, Word | Literal],
        faults: list[Diagnostic],
    ) -> None:
        self.act, self.operation, self.values, self.faults = act, operation, values, faults
        self.written: dict[str, Clause] = {}
        for clause in act.clauses:
            if clause.keyword in self.written:
                faults.append(
                    Diagnostic("S007", f"`{clause.keyword}` is said twice", clause.span, "join selectors with `+`")
                )
            self.written.setdefault(clause.keyword, clause)

    def name(self) -> str | None:
        """What follows `as`."""
        clause = self.written.get("as")
        if clause is None or not isinstance(clause.value, Word):
            return None
        name = clause.value.text
        if "." in name:
            said = f"'{name}' cannot be a name"
            self.faults.append(Diagnostic("S033", said, clause.value.span, "choose another, without a dot"))
        return name

    def selector(self, whole: Selector | None) -> Selector | None:
        """Where the statement acts. whole: what was said of that before the clauses."""
        on = self.written.get("on")
        if on is not None and whole is None and self.operation.selecting:
            self.faults.append(
                Diagnostic(
                    "S018",
                    f"{self.act.verb.text} does not act `on` a place",
                    on.span,
                    f"expected {self.selecting()}",
                    f"write `{self.operation.selecting[0]} {short(on.value.span.text)}`",
                )
            )
        if on is not None:
            if whole is not None:
                self.faults.append(Diagnostic("S007", "what it acts on is said twice", on.span, "remove one of them"))
            whole = self.resolved(on)
        whole = whole or self.operation.default_selector
        if whole is None and self.operation.acts_on and on is None and not self.faults:
            self.faults.append(
                Diagnostic(
                    "S018",
                    f"{self.act.verb.text} is not told what to act on",
                    self.act.span,
                    f"expected {self.selecting()} and a selector",
                    "for example "
                    + (
                        ", ".join(f"`{word} ffn`" for word in self.operation.selecting)
                        or "`on attn.q,v`, `on ffn`, `on all linear`, `on layers 0..3`"
                    ),
                )
            )
        for keyword, combine in (("in", Intersection), ("except", Difference)):
            if keyword in self.written:
                other = self.resolved(self.written[keyword])
                if whole is not None and other is not None:
                    whole = combine(whole, other, self.act.span)
        return whole

    def selecting(self) -> str:
        """The words that a selector may follow."""
        return listed([f"`{word}`" for word in self.operation.selecting or ("on",)])

    def resolved(self, clause: Clause) -> Selector | None:
        try:
            return resolve(clause.value)
        except ProgramError as error:
            self.faults += error.diagnostics
            return None

    def expect(self) -> int | None:
        """The number of places that follows `expect`."""
        if "expect" not in self.written:
            return None
        said: Selection = self.written["expect"].value
        value = self.values.get(said.text, said) if isinstance(said, Word) else said
        try:
            if isinstance(value, Literal):
                limits = Limits("`expect`", ("count",), at_least=1)
                return int(convert(moved(value, said.span), limits, None))
            raise ProgramError.of("S012", "`expect` takes a number", said.span, f"expected {wanted(('count',))}")
        except ProgramError as error:
            self.faults += error.diagnostics
            return None
