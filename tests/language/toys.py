"""Verbs that only tests have: one with every way to write an option, one that acts on nothing, one that is broken."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from surgery.anatomy.parts import Kind
from surgery.language.selector import Selector
from surgery.operations.base import (
    Count,
    File,
    Flag,
    Number,
    Operation,
    Phase,
    Ratio,
    Selection,
    Share,
    Text,
    Variant,
    Word,
    flag,
    kind,
    option,
    payload,
    quantity,
    same_as,
)


@dataclass(frozen=True, kw_only=True)
class Toy(Operation):
    """Every way to write an option."""

    verb: ClassVar[str] = "toy"
    phase: ClassVar[Phase] = "attach"
    acts_on: ClassVar[tuple[Kind, ...]] = ("projection",)
    leads: ClassVar[bool] = True

    mode: Word = kind("how", choices=("plain", "fancy"), default="plain")
    amount: Share | Ratio | Count = quantity("how much", at_least=0, default=0.5)
    width: Count = option("a count", at_least=1, at_most=512, default=4)
    steps: Count = option("with a unit", unit="steps", default=100)
    rate: Number = option("a number", above=0, default=same_as("width"))
    drop: Share = option("a share", below=1, default=0.0)
    dtype: Word | None = option("a word", choices=("bf16", "fp16"), default=None)
    label: Word = option("any word", default="none")
    title: Text = option("a text", default="")
    using: File | None = option("a path", default=None)
    after: Selection | None = option("a place", default=None)
    via: Variant | None = option(
        "a variant", default=None, choices={"mlp": payload(Count, default=512, at_least=1), "text": Text, "lstm": None}
    )
    global_: Flag = flag("a flag that is a word of Python")
    gated: Flag = flag("a flag")

    def validate(self) -> Iterable[tuple[str, str, str]]:
        if self.gated and self.global_:
            yield "gated", "`gated` and `global` exclude each other", "leave one of them out"


@dataclass(frozen=True, kw_only=True)
class Tune(Operation):
    """Acts on the whole model; nothing to select."""

    verb: ClassVar[str] = "tune"
    phase: ClassVar[Phase] = "schedule"
    default_selector: ClassVar[Selector | None] = None

    lr: Number = option("learning rate", above=0)
