"""What a statement acts on, as a value: a small tree of roles, globs and layers with set operations."""

from __future__ import annotations

from dataclasses import dataclass, field

from surgery.language.source import NOWHERE, Span


@dataclass(frozen=True)
class Role:
    """Parts by meaning: `attn.q`, `ffn`, `base`; also `linear` and `layers`, written `all linear`, `all layers`."""

    name: str
    span: Span = field(default=NOWHERE, compare=False, repr=False)


@dataclass(frozen=True)
class Glob:
    """Parts by module path, a quoted shell pattern where `*` stays within one path component and `**` does not."""

    pattern: str
    span: Span = field(default=NOWHERE, compare=False, repr=False)


@dataclass(frozen=True)
class Layers:
    """Everything in some layers. `first..last` is inclusive, negative counts from the end; parity is `even` or `odd`.

    All of `first`, `last` and `parity` None: every layer of the stack.
    """

    first: int | None = None
    last: int | None = None
    parity: str | None = None
    stack: str | None = None
    span: Span = field(default=NOWHERE, compare=False, repr=False)


@dataclass(frozen=True)
class Union:
    """Parts of any of these."""

    items: tuple[Selector, ...]
    span: Span = field(default=NOWHERE, compare=False, repr=False)


@dataclass(frozen=True)
class Intersection:
    """Parts of the selection that lie in the scope: `on ffn in layers 0..3`."""

    whole: Selector
    scope: Selector
    span: Span = field(default=NOWHERE, compare=False, repr=False)


@dataclass(frozen=True)
class Difference:
    """Parts of the whole that are not in the cut: `on ffn except layers 3`."""

    whole: Selector
    cut: Selector
    span: Span = field(default=NOWHERE, compare=False, repr=False)


Selector = Role | Glob | Layers | Union | Intersection | Difference
