"""Options of operations: the markers that type them, the helpers that declare them, and the schema read off a class."""

from __future__ import annotations

import dataclasses
import math
import operator
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from surgery.language.selector import Selector

Form = Literal[
    "count", "number", "counts", "numbers", "share", "ratio", "word", "flag", "text", "file", "variant", "selection",
    "size", "comparison",
]  # fmt: skip


@dataclass(frozen=True)
class Ratio:
    """`2:4`, two of every four."""

    part: int
    whole: int

    def __str__(self) -> str:
        return f"{self.part}:{self.whole}"


@dataclass(frozen=True)
class Variant:
    """A word that may carry a value: `via mlp 512`, `init text "Translate:"`."""

    word: str
    value: int | float | str | Path | None = None


SIZES: Mapping[str, float] = MappingProxyType({"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12})
"""Units of a size in bytes, decimal ones."""
HOLDS: Mapping[str, Callable[[float, float], bool]] = MappingProxyType(
    {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne}
)


@dataclass(frozen=True)
class Comparison:
    """`< 1%`, `< 200 MB`, `<= 1.05 of base`: what a measured value is compared with.

    bound: as written, a share as a fraction. unit: `%`, one of SIZES, or nothing. of: `base` where the bound is a
    multiple of what the same measurement gives there.
    """

    relation: str
    bound: float
    unit: str = ""
    of: str = ""

    def limit(self, base: float | None = None) -> float:
        """What is compared with: a fraction, a number, or bytes. base: the measurement there, of one `of base`."""
        bound = self.bound * SIZES.get(self.unit, 1)
        if not self.of:
            return bound
        assert base is not None, f"a comparison with {self.of} needs its measurement"
        return bound * base

    def holds(self, found: float, base: float | None = None) -> bool:
        """Whether it is so; of what is no number nothing is."""
        limit = self.limit(base)
        return not (math.isnan(found) or math.isnan(limit)) and HOLDS[self.relation](found, limit)


# What an option is written like; to a type checker they are plain Python types.
Count = Annotated[int, "count"]
Number = Annotated[float, "number"]
Counts = Annotated[tuple[int, ...], "counts"]
Numbers = Annotated[tuple[float, ...], "numbers"]
Share = Annotated[float, "share"]
Word = Annotated[str, "word"]
Flag = Annotated[bool, "flag"]
Text = Annotated[str, "text"]
File = Annotated[Path, "file"]
Selection = Annotated[Selector, "selection"]
Size = Annotated[float, "size"]


@dataclass(frozen=True)
class SameAs:
    """Stands for a default that is another field's value."""

    field: str


@dataclass(frozen=True)
class Payload:
    """The value that a choice of a Variant carries; required when `default` is MISSING."""

    form: Form
    default: Any = dataclasses.MISSING
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None


@dataclass(frozen=True)
class Declaration:
    """What `option`, `flag`, `kind`, `quantity` and `comparison` put into a field's metadata."""

    place: Literal["option", "flag", "kind", "quantity"]
    help: str
    choices: Any = None
    unit: str = ""
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    bounds: Any = None
    of: tuple[str, ...] = ()


@dataclass(frozen=True)
class Option:
    """One option of a verb as the parser, the formatter and the reference see it.

    forms: what it may be written like. choices: the words (or numbers) allowed, with the payload each one carries.
    bounds: what a comparison's bound may be written like. of: words after which it may be relative, `1.05 of base`.
    """

    name: str
    place: Literal["option", "flag", "kind", "quantity"]
    help: str
    forms: tuple[Form, ...]
    default: Any = dataclasses.MISSING
    choices: Mapping[Any, Payload | None] = field(default_factory=dict)
    unit: str = ""
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    bounds: tuple[Form, ...] = ()
    of: tuple[str, ...] = ()

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def word(self) -> str:
        """The field's name as it is written; a trailing underscore keeps a field off Python's keywords."""
        return self.name.rstrip("_")


def option(
    help: str,
    *,
    default: Any = dataclasses.MISSING,
    choices: Any = None,
    unit: str = "",
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """A named option, `rank 8`; required when it has no default."""
    return _field(Declaration("option", help, choices, unit, at_least, above, at_most, below), default)


def flag(help: str) -> Any:
    """A bare word that is there or not, `double`."""
    return _field(Declaration("flag", help), False)


def kind(help: str, *, choices: Any, default: Any = dataclasses.MISSING) -> Any:
    """A bare word out of a few, right after the verb or its leading selector: `magnitude`."""
    return _field(Declaration("kind", help, choices), default)


def quantity(
    help: str,
    *,
    default: Any = dataclasses.MISSING,
    unit: str = "",
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """A bare value, `50%`, `2:4`, `20`."""
    return _field(Declaration("quantity", help, None, unit, at_least, above, at_most, below), default)


def comparison(help: str, *, bound: Any, of: tuple[str, ...] = ()) -> Any:
    """`< 1%`, in the place of a quantity. bound: how its bound is written, `Share | Count`; of: `("base",)`."""
    return _field(Declaration("quantity", help, at_least=0, bounds=bound, of=of), dataclasses.MISSING)


def same_as(name: str) -> SameAs:
    """A default copied from another field."""
    return SameAs(name)


def payload(
    form: Any,
    *,
    default: Any = dataclasses.MISSING,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Payload:
    """A Variant's choice with a value: `choices={"mlp": payload(Count, default=512, at_least=1)}`."""
    return Payload(_forms(form)[0], default, at_least, above, at_most, below)


def schema(operation: type) -> tuple[Option, ...]:
    """The options a class declares, in order; base classes first."""
    return _schema(operation)


@cache
def _schema(operation: Any) -> tuple[Option, ...]:
    return tuple(
        _option(operation, declared) for declared in dataclasses.fields(operation) if "surgery" in declared.metadata
    )


def _option(operation: type, declared: dataclasses.Field[Any]) -> Option:
    declaration: Declaration = declared.metadata["surgery"]
    choices = declaration.choices or ()
    named = choices if isinstance(choices, Mapping) else dict.fromkeys(choices)
    return Option(
        name=declared.name,
        place=declaration.place,
        help=declaration.help,
        forms=_forms(_annotation(operation, declared.name)),
        default=declared.default,
        choices=MappingProxyType({word: _payload(carried) for word, carried in named.items()}),
        unit=declaration.unit,
        at_least=declaration.at_least,
        above=declaration.above,
        at_most=declaration.at_most,
        below=declaration.below,
        bounds=() if declaration.bounds is None else _forms(declaration.bounds),
        of=declaration.of,
    )


def _payload(carried: Any) -> Payload | None:
    return carried if carried is None or isinstance(carried, Payload) else payload(carried)


def _annotation(operation: type, name: str) -> Any:
    # Only this field's annotation is evaluated: others may name what is imported for type checkers alone.
    for owner in operation.__mro__:
        annotation = vars(owner).get("__annotations__", {}).get(name)
        if annotation is not None:
            if isinstance(annotation, str):
                return eval(annotation, dict(vars(sys.modules[owner.__module__])))
            return annotation
    raise TypeError(f"{operation.__name__}.{name} has no annotation")


def _forms(annotation: Any) -> tuple[Form, ...]:
    if annotation is Ratio:
        return ("ratio",)
    if annotation is Variant:
        return ("variant",)
    if annotation is Comparison:
        return ("comparison",)
    if get_origin(annotation) is Annotated:
        return (get_args(annotation)[1],)
    if get_origin(annotation) in (Union, UnionType):
        return tuple(form for part in get_args(annotation) if part is not NoneType for form in _forms(part))
    raise TypeError(f"{annotation!r} is no way to write an option; use Count, Number, Share, Ratio, Word, ...")


def _field(declaration: Declaration, default: Any) -> Any:
    return field(default=default, kw_only=True, metadata={"surgery": declaration})
