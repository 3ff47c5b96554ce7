"""Selections obey the laws of sets and answer mistakes with what the model has (promise: selectors are values)."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest

from surgery.anatomy import Anatomy, Part, select, study
from surgery.anatomy.absent import WORDS
from surgery.anatomy.parts import Kind
from surgery.errors import ModelError
from surgery.language.selector import Difference, Glob, Intersection, Layers, Role, Selector, Union
from tests import zoo

MATRICES = ("projection", "experts")


@pytest.fixture(scope="module")
def anatomies() -> dict[str, Anatomy]:
    return {name: study(s.model, s.example) for name in ("llama", "gpt2", "t5", "nano") for s in [zoo.specimen(name)]}


def channels(parts: tuple[Part, ...]) -> set[tuple[str, int]]:
    """Every output channel of every matrix selected."""
    return {
        (part.path, channel)
        for part in parts
        for start, stop in part.channels or ((0, part.shape[0]),)
        for channel in range(start, stop)
    }


def chosen(anatomy: Anatomy, selector: Selector) -> set[tuple[str, int]]:
    """Channels of a selection; nothing where nothing is left."""
    try:
        return channels(select(anatomy, selector, MATRICES))
    except ModelError as error:
        if error.diagnostics[0].code != "S207":
            raise
        return set()


LEAVES: tuple[Selector, ...] = (
    Role("attn"),
    Role("attn.q"),
    Role("ffn"),
    Role("linear"),
    Layers(0, 0),
    Layers(-1, -1),
    Layers(parity="even"),
    Glob("**.1.**"),
)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "nano"])
def test_laws_of_sets(anatomies: dict[str, Anatomy], name: str) -> None:
    anatomy = anatomies[name]
    sets = {leaf: chosen(anatomy, leaf) for leaf in LEAVES}
    assert all(sets.values())
    for a, b in itertools.product(LEAVES, LEAVES):
        assert chosen(anatomy, Union((a, b))) == sets[a] | sets[b], (a, b)
        assert chosen(anatomy, Intersection(a, b)) == sets[a] & sets[b], (a, b)
        assert chosen(anatomy, Difference(a, b)) == sets[a] - sets[b], (a, b)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "nano"])
def test_order_and_duplicates(anatomies: dict[str, Anatomy], name: str) -> None:
    """Execution order whatever the order of the words, and the same parts for a + b as for b + a."""
    anatomy = anatomies[name]
    for a, b in itertools.combinations(LEAVES, 2):
        found = select(anatomy, Union((a, b)), MATRICES)
        assert found == select(anatomy, Union((b, a)), MATRICES)
        assert len(set(found)) == len(found)
        places = [next(i for i, p in enumerate(anatomy.parts) if p.path == part.path) for part in found]
        assert places == sorted(places)


def test_counts(anatomies: dict[str, Anatomy]) -> None:
    llama = anatomies["llama"]
    assert len(select(llama, Role("linear"), MATRICES)) == 21
    assert len(select(llama, Role("base"), MATRICES)) == 21
    assert [p.path for p in select(llama, Role("head"), MATRICES)] == ["lm_head"]
    assert [p.layer for p in select(llama, Intersection(Role("ffn.down"), Layers(-2, -1)), MATRICES)] == [1, 2]
    assert [p.layer for p in select(llama, Intersection(Role("ffn.down"), Layers(parity="even")), MATRICES)] == [0, 2]
    assert [p.layer for p in select(llama, Intersection(Role("ffn.down"), Layers(parity="odd")), MATRICES)] == [1]
    assert len(select(llama, Role("ffn"), ("block",))) == 3
    assert len(select(llama, Role("norm"), ("norm",))) == 7


def test_whole_projections_once(anatomies: dict[str, Anatomy]) -> None:
    """`all linear` names a fused projection once and whole; roles of it are covered by it."""
    found = select(anatomies["gpt2"], Union((Role("linear"), Role("attn.q"))), MATRICES)
    assert len(found) == 12
    assert all(part.channels is None and part.role == "linear" for part in found)


def test_rest_of_a_fused_projection(anatomies: dict[str, Anatomy]) -> None:
    first = select(anatomies["gpt2"], Difference(Role("linear"), Role("attn.k")), MATRICES)[0]
    assert first.path == "transformer.h.0.attn.c_attn"
    assert first.channels == ((0, 21), (42, 63))


def test_attention(anatomies: dict[str, Anatomy]) -> None:
    """`all layers` means self-attention; cross attention is named."""
    t5 = anatomies["t5"]
    assert [(p.role, p.stack) for p in select(t5, Role("layers"), ("attention",))] == [
        ("attn", "encoder"), ("attn", "encoder"), ("attn", "decoder"), ("attn", "decoder"), ("attn", "decoder"),
    ]  # fmt: skip
    both = select(t5, Union((Role("layers"), Role("cross"))), ("attention",))
    assert sorted(p.role for p in both) == ["attn"] * 5 + ["cross"] * 3
    inside = select(t5, Intersection(Role("layers"), Layers(stack="decoder", first=0, last=1)), ("attention",))
    assert [(p.stack, p.layer) for p in inside] == [("decoder", 0), ("decoder", 1)]


@pytest.mark.parametrize(
    ("name", "selector", "code", "words"),
    [
        ("llama", Role("atn.q"), "S203", ["unknown role 'atn.q'", "did you mean 'attn.q'", "attn.q,k,v,o"]),
        ("llama", Role("cross.k"), "S203", ["has no cross.k", "ffn.gate,up,down"]),
        ("gpt2", Role("ffn.gate"), "S203", ["has no ffn.gate", "ffn.up,down"]),
        ("llama", Layers(stack="encoder"), "S204", ["has no encoder", "decoder (3 layers)"]),
        ("llama", Layers(3, 3), "S205", ["has no layer 3", "decoder has 3 layers, 0..2"]),
        ("llama", Layers(0, 11), "S205", ["has no layers 0..11", "3 layers"]),
        ("llama", Layers(-4, -1), "S205", ["-3..-1"]),
        ("llama", Layers(2, 1), "S205", ["backwards"]),
        ("llama", Glob("model.layer.*.mlp"), "S206", ["matches 'model.layer.*.mlp'", "model.layers"]),
        ("llama", Difference(Role("ffn"), Role("ffn")), "S207", ["nothing is left"]),
        ("llama", Role("norm"), "S207", ["selects no projection"]),
    ],
)
def test_mistakes(anatomies: dict[str, Anatomy], name: str, selector: Selector, code: str, words: list[str]) -> None:
    with pytest.raises(ModelError) as raised:
        select(anatomies[name], selector, MATRICES)
    assert [diagnostic.code for diagnostic in raised.value.diagnostics] == [code]
    for word in words:
        assert word in str(raised.value)


def test_globs_stay_within_a_component(anatomies: dict[str, Anatomy]) -> None:
    llama = anatomies["llama"]
    assert len(select(llama, Glob("model.layers.*.mlp.*"), MATRICES)) == 9
    assert len(select(llama, Glob("model.layers.1.**"), MATRICES)) == 7
    with pytest.raises(ModelError):
        select(llama, Glob("model.*.up_proj"), MATRICES)


def test_every_kind_has_a_word() -> None:
    """A selector that finds nothing of a kind is an error that can be said."""
    assert WORDS.keys() == set(get_args(Kind))
