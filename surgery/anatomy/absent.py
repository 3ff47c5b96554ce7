"""What to say when a selector names something that the model does not have: always with what it has."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

from surgery.anatomy.parts import Anatomy, Kind, Part
from surgery.errors import ModelError
from surgery.language.selector import Glob, Layers, Role, Selector
from surgery.language.source import NOWHERE, Span

ROLES = (
    "attn", "attn.q", "attn.k", "attn.v", "attn.o", "cross", "cross.q", "cross.k", "cross.v", "cross.o",
    "ffn", "ffn.up", "ffn.gate", "ffn.down", "embed", "position", "norm", "head", "router", "experts",
    "mixer", "mixer.in", "mixer.out", "base", "linear", "layers", "bias",
)  # fmt: skip


def place_of(span: Span) -> Span | None:
    return None if span == NOWHERE else span


def inventory(anatomy: Anatomy) -> str:
    """The model's roles, those of one family together: `attn.q,k,v,o, ffn.up,down, embed, norm`."""
    families: dict[str, list[str]] = {}
    for part in anatomy.parts:
        family, _, leaf = part.role.partition(".")
        if part.kind in ("block", "edge") or part.role in ("linear", "lookup"):
            continue
        leaves = families.setdefault(family, [])
        if leaf and leaf not in leaves:
            leaves.append(leaf)
    return ", ".join(family + ("." + ",".join(leaves) if leaves else "") for family, leaves in families.items())


def stacks(anatomy: Anatomy) -> str:
    return ", ".join(f"{stack.name} ({counted(stack.depth)})" for stack in anatomy.stacks) or "no layers"


def counted(depth: int) -> str:
    return f"{depth} layer{'s' if depth != 1 else ''}"


def nearest(word: str, words: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(words), 1, 0.6)
    return f"did you mean {close[0]!r}? " if close else ""


def role_missing(anatomy: Anatomy, selector: Role) -> ModelError:
    name = selector.name
    have = f"it has {inventory(anatomy)}" if anatomy.parts else "no part of it has a role"
    if name == "bias":
        have = "`train bias add` gives linear maps one"
    if name in ROLES:
        return ModelError.of(
            "S203", f"{anatomy.model} has no {name}", place_of(selector.span), "no such part in this model", have
        )
    hint = nearest(name, dict.fromkeys([part.role for part in anatomy.parts] + list(ROLES)))
    return ModelError.of("S203", f"unknown role {name!r}", place_of(selector.span), "not a role", hint + have)


def stack_missing(anatomy: Anatomy, selector: Layers) -> ModelError:
    return ModelError.of(
        "S204",
        f"{anatomy.model} has no {selector.stack}",
        place_of(selector.span),
        "no such stack in this model",
        f"it has {stacks(anatomy)}",
    )


def layer_missing(anatomy: Anatomy, selector: Layers, depths: Mapping[str, int]) -> ModelError:
    if not depths:
        return ModelError.of(
            "S205", f"{anatomy.model} has no layers", place_of(selector.span), "no list of layers found"
        )
    first, last = selector.first, selector.last if selector.last is not None else selector.first
    wanted = f"layer {first}" if first == last else f"layers {first}..{last}"
    reach = "; ".join(f"{name} has {counted(depth)}, 0..{depth - 1}, or -{depth}..-1" for name, depth in depths.items())
    backwards = (
        first is not None and last is not None and all(-d <= e < d for d in depths.values() for e in (first, last))
    )
    return ModelError.of(
        "S205",
        f"{wanted} is empty: it runs backwards" if backwards else f"{anatomy.model} has no {wanted}",
        place_of(selector.span),
        "out of range" if not backwards else "runs backwards",
        reach,
    )


def no_match(anatomy: Anatomy, selector: Glob) -> ModelError:
    paths = list(dict.fromkeys(part.path for part in anatomy.parts if part.path))
    close = difflib.get_close_matches(selector.pattern, paths, 3, 0.3) or paths[:3]
    return ModelError.of(
        "S206",
        f"no module of {anatomy.model} with a role matches {selector.pattern!r}",
        place_of(selector.span),
        "matches nothing",
        "* stays within one component of a path, ** does not; modules here are called " + ", ".join(map(repr, close)),
    )


WORDS: dict[Kind, str] = {
    "projection": "projection",
    "lookup": "lookup",
    "norm": "norm",
    "attention": "attention call",
    "experts": "stack of experts",
    "block": "block",
    "edge": "output of a sub-layer",
    "bias": "bias",
    "tensor": "other tensor",
    "entry": "entry of a stack with attention",
}


def nothing_left(anatomy: Anatomy, selector: Selector, kinds: tuple[Kind, ...]) -> ModelError:
    wanted = " or ".join(WORDS[kind] for kind in kinds)
    present: list[Part] = [part for part in anatomy.parts if part.kind in kinds]
    if not present:
        return ModelError.of(
            "S207",
            f"{anatomy.model} has no {wanted}",
            place_of(selector.span),
            "nothing here to act on",
            f"it has {inventory(anatomy)}",
        )
    roles = ", ".join(dict.fromkeys(part.role for part in present))
    return ModelError.of(
        "S207",
        f"this selects no {wanted}",
        place_of(selector.span),
        "nothing is left",
        f"as {wanted} the model has {roles}, in {stacks(anatomy)}",
    )
