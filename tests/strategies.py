"""Draws models and programs: a seed fills the weights, and programs are syntax trees for the drawn model's real sites.

A failure shrinks to something like `lora rank 1 on attn.q` on a decoder of one layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from surgery.language.program import Program, Statement
from surgery.language.selector import Difference, Intersection, Layers, Role, Selector, Union
from surgery.operations.adapter import ACTIVATIONS, Adapter
from surgery.operations.base import Operation, Ratio, Variant
from surgery.operations.freeze import Freeze
from surgery.operations.ia3 import Ia3
from surgery.operations.lora import Lora
from surgery.operations.lottery import Lottery
from surgery.operations.optimize import NAMES, Optimize
from surgery.operations.prefix import Prefix
from surgery.operations.prompt import Prompt
from surgery.operations.prune import Prune
from surgery.operations.ptuning import Ptuning
from surgery.operations.quantize import Quantize
from surgery.operations.sparse import Sparse
from surgery.operations.train import Train
from tests import zoo
from tests.reference_decoder import ReferenceDecoder, Shape, reference_decoder

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
PROJECTIONS = ("attn.q", "attn.k", "attn.v", "attn.o", "ffn.up", "ffn.gate", "ffn.down")


@dataclass(frozen=True)
class Model:
    """A reference decoder to be built: everything that makes it, printable in a failure."""

    shape: Shape
    seed: int = 0
    dtype: str = "float64"

    def build(self) -> ReferenceDecoder:
        return reference_decoder(self.shape, self.seed, DTYPES[self.dtype])

    @property
    def tokens(self) -> Tensor:
        """(2, 5) token ids."""
        return zoo.tokens(self.shape.vocabulary, 2, 5, self.seed)

    @property
    def eps(self) -> float:
        return torch.finfo(DTYPES[self.dtype]).eps

    @property
    def roles(self) -> tuple[str, ...]:
        """Projections that the model has, by role."""
        return tuple(role for role in PROJECTIONS if role != "ffn.gate" or self.shape.gated)

    @property
    def layers(self) -> int:
        return self.shape.layers


@st.composite
def models(draw: st.DrawFn, dtypes: tuple[str, ...] = tuple(DTYPES), **fixed: Any) -> Model:
    """Reference decoders with odd sizes, grouped-query attention, biases, ties and fused projections."""
    groups = draw(st.integers(1, 3))
    key_value_heads = draw(st.integers(1, 2))
    heads = groups * key_value_heads
    fields: dict[str, Any] = {
        "vocabulary": draw(st.integers(17, 43)),
        "width": heads * 2 * draw(st.integers(2, 5)),
        "layers": draw(st.integers(1, 3)),
        "heads": heads,
        "key_value_heads": key_value_heads,
        "ffn": draw(st.integers(9, 33)),
        "positions": draw(st.sampled_from(["rotary", "learned"])),
        "attention": draw(st.sampled_from(["masked", "causal", "hand"])),
        "gated": draw(st.booleans()),
        "fused": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "tied": draw(st.booleans()),
    }
    return Model(Shape(**{**fields, **fixed}), draw(st.integers(0, 999)), draw(st.sampled_from(dtypes)))


def numbers() -> st.SearchStrategy[float]:
    """Values of `alpha`: whole, and with a short decimal fraction."""
    return st.sampled_from([1.0, 2.0, 3.5, 16.0])


def loras(exact: bool = False, coded: bool = False) -> st.SearchStrategy[Lora]:
    """`exact`: only those that promise identity to the bit at the start (pissa rounds). coded: over 4-bit weights."""
    inits: list[str | Variant] = ["kaiming", "normal", "xavier", "orthogonal"]
    if not exact:
        inits += ["pissa", Variant("loftq", 2)] if coded else ["pissa"]
    return st.builds(
        Lora,
        rank=st.integers(1, 3),
        alpha=numbers(),
        dropout=st.sampled_from([0.0, 0.05, 0.5]),
        init=st.sampled_from(inits),
        scale=st.sampled_from(["alpha", "rs"]),
        dora=st.booleans(),
    ).filter(lambda lora: not (lora.dora and lora.from_weight))


def prunes(ratios: bool = True) -> st.SearchStrategy[Prune]:
    shares = st.sampled_from([0.1, 0.5, 0.37, 0.9])
    unstructured = st.builds(
        Prune, score=st.sampled_from(["magnitude", "random"]), amount=shares, global_=st.booleans()
    )
    patterns = st.builds(Prune, score=st.sampled_from(["magnitude", "random"]), amount=st.just(Ratio(1, 2)))
    return unstructured | patterns if ratios else unstructured


def sparses(methods: tuple[str, ...] = ("static", "set", "rigl")) -> st.SearchStrategy[Sparse]:
    """Masks that swap often, so that a few steps show it; with an end and without."""
    moving = st.builds(
        Sparse,
        method=st.sampled_from([method for method in methods if method != "static"]),
        amount=st.sampled_from([0.3, 0.5, 0.8]),
        swap=st.sampled_from([None, 0.1, 0.5, 1.0]),
        every=st.integers(1, 3),
        until=st.sampled_from([None, 7, 12, 0.6, 1.0]),
        budget=st.sampled_from(["er", "uniform"]),
        start=st.sampled_from(["random", "magnitude"]),
    )
    if "static" not in methods:
        return moving
    amounts, starts = st.sampled_from([0.0, 0.37, 0.8]), st.sampled_from(["random", "magnitude"])
    return moving | st.builds(Sparse, method=st.just("static"), amount=amounts, start=starts)


def gradual() -> st.SearchStrategy[Prune]:
    return st.builds(
        Prune,
        score=st.just("magnitude"),
        amount=st.sampled_from([0.0, 0.2]),
        to=st.sampled_from([0.5, 0.9]),
        over=st.sampled_from([7, 9]),
        every=st.integers(1, 3),
        global_=st.booleans(),
    )


def lotteries() -> st.SearchStrategy[Lottery]:
    return st.builds(
        Lottery,
        amount=st.sampled_from([0.5, 0.8]),
        rounds=st.integers(1, 3),
        rewind=st.sampled_from([0, 3]),
        global_=st.booleans(),
    )


@st.composite
def masked(draw: st.DrawFn, model: Model, operation: st.SearchStrategy[Operation]) -> Statement:
    """A statement that trains weights under a mask, on whole projections: fused ones are not cut."""
    role = draw(st.sampled_from(["attn", "ffn", "attn.o", "ffn.down"]))
    scope = draw(st.none() | layer_ranges(model.layers))
    return Statement(draw(operation), Role(role) if scope is None else Intersection(Role(role), scope))


def quantizes() -> st.SearchStrategy[Quantize]:
    """4-bit formats in blocks, and int8, which has a scale for each row and no options of blocks."""
    compute = st.sampled_from(["input", "fp32"])
    in_blocks = st.builds(
        Quantize,
        format=st.sampled_from(["nf4", "fp4"]),
        double=st.booleans(),
        block=st.sampled_from([64, 128]),
        compute=compute,
    )
    return in_blocks | st.builds(Quantize, format=st.just("int8"), compute=compute)


def prefixes() -> st.SearchStrategy[Prefix]:
    """Plain, through an MLP, or behind a gate; not from a text, which needs a tokenizer."""
    via = st.sampled_from([None, Variant("mlp", 7)])
    return st.builds(_prefix, st.integers(1, 4), via, st.booleans())


def _prefix(count: int, via: Variant | None, gated: bool) -> Prefix:
    fields: dict[str, Any] = {_quantity_of(Prefix): count, "via": via, "gated": gated}
    return Prefix(**fields)


def prompts() -> st.SearchStrategy[Prompt | Ptuning]:
    """Rows in front, their own or made by a network; not from a text, which needs a tokenizer."""
    starts = st.sampled_from([None, Variant("vocab"), Variant("normal")])
    networks = st.sampled_from([None, Variant("mlp", 5), Variant("lstm", 3)])
    trained = st.builds(lambda n, init: Prompt(positions=n, init=init), st.integers(1, 4), starts)
    made = st.builds(lambda n, via: Ptuning(version="v1", positions=n, via=via), st.integers(1, 4), networks)
    return trained | made


@st.composite
def bottlenecks(draw: st.DrawFn, model: Model) -> list[Statement]:
    """An adapter after or beside some sub-layers of some layers, or two of them in a row."""
    where = draw(st.sampled_from([Role("ffn"), Role("attn"), Union((Role("attn"), Role("ffn")))]))
    scope = draw(st.none() | layer_ranges(model.layers))
    chosen: Selector = where if scope is None else Intersection(where, scope)
    names = ["left", "right"] if draw(st.booleans()) else [None]
    made = []
    for name in names:
        operation = Adapter(
            activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
            bottleneck=draw(st.integers(1, 5)),
            scale=draw(st.sampled_from([1.0, -2.0, 0.5, Variant("learned", 1.0), Variant("learned", 4.0)])),
            dropout=draw(st.sampled_from([0.0, 0.5])),
            norm=draw(st.booleans()),
            then="right" if name == "left" else None,
            **{draw(st.sampled_from(["after", "beside"])): where},
        )
        made.append(Statement(operation, chosen, name))
    return made


def optimizes() -> st.SearchStrategy[Optimize]:
    """Any optimizer, with a learning rate that changes what it steps."""
    paged = st.builds(Optimize, name=st.sampled_from(NAMES[:-2]), lr=st.just(0.01), paged=st.booleans())
    return paged | st.builds(Optimize, name=st.sampled_from(NAMES[-2:]), lr=st.just(0.01))


@st.composite
def trainings(draw: st.DrawFn, model: Model, quantized: bool = False, add: bool = False) -> list[Statement]:
    """A `train` statement, and a `freeze` that leaves something of it. quantized: nothing that is kept as codes."""
    roles = ["norm", "embed", "head", *(["bias"] if model.shape.bias or add else [])]
    roles += [] if quantized else ["attn", "ffn", "layers"]
    role = draw(st.sampled_from(roles))
    selector: Selector = Role(role)
    if role not in ("embed", "head", "layers") and draw(st.booleans()):
        selector = Intersection(selector, draw(layer_ranges(model.layers)))
    made = [Statement(Train(add=add), selector)]
    if role == "layers" and draw(st.booleans()):
        made.append(Statement(Freeze(), draw(st.sampled_from([Role("attn"), Role("ffn"), Role("norm")]))))
    return made


@cache
def _quantity_of(operation: type[Operation]) -> str:
    """Name of the field that a bare value fills."""
    from surgery.operations.options import schema

    (name,) = (option.name for option in schema(operation) if option.place == "quantity")
    return name


@st.composite
def selectors(draw: st.DrawFn, roles: tuple[str, ...], layers: int) -> Selector:
    """These roles, perhaps only in some layers, perhaps without some of them. Never empty."""
    chosen: Selector = Role(roles[0]) if len(roles) == 1 else Union(tuple(Role(role) for role in roles))
    scope = draw(st.none() | layer_ranges(layers))
    if scope is not None:
        chosen = Intersection(chosen, scope)
    elif layers > 1 and draw(st.booleans()):
        chosen = Difference(chosen, _single(draw(st.integers(0, layers - 1))))
    return chosen


@st.composite
def layer_ranges(draw: st.DrawFn, layers: int) -> Layers:
    """A layer, a range of layers from either end, or the even ones. Never empty."""
    first = draw(st.integers(0, layers - 1))
    last = draw(st.integers(first, layers - 1))
    form = draw(st.sampled_from(["front", "back", "even"]))
    if form == "even":
        return Layers(parity="even")
    if form == "back":
        return Layers(first=first - layers, last=last - layers)
    return Layers(first=first, last=last)


def _single(layer: int) -> Layers:
    return Layers(first=layer, last=layer)


@st.composite
def statements(
    draw: st.DrawFn, model: Model, operation: st.SearchStrategy[Operation], roles: tuple[str, ...] | None = None
) -> Statement:
    """One statement on some projections of the model."""
    available = model.roles if roles is None else roles
    chosen = tuple(draw(st.lists(st.sampled_from(available), min_size=1, max_size=3, unique=True)))
    return _fitting(Statement(draw(operation), draw(selectors(chosen, model.layers))), model)


def _fitting(statement: Statement, model: Model) -> Statement:
    """With `1:2` patterns replaced where an input is odd."""
    operation = statement.operation
    odd = model.shape.width % 2 or model.shape.ffn % 2
    if odd and isinstance(operation, Prune) and isinstance(operation.amount, Ratio):
        return replace(statement, operation=replace(operation, amount=0.5))
    return statement


@st.composite
def tabled(draw: st.DrawFn, statement: Statement, model: Model) -> Statement:
    """Perhaps with a rank, or an alpha, for each layer that the statement acts on."""
    from tests.properties import hand

    operation = statement.operation
    layers = {layer for layer, _ in hand.spots(statement.selector, model.shape)}
    which = draw(st.sampled_from(["neither", "neither", "rank", "alpha"]))
    if which == "neither" or len(layers) < 2 or not isinstance(operation, Lora):
        return statement
    entry = st.integers(1, 3) if which == "rank" else numbers()
    table = tuple(draw(st.lists(entry, min_size=len(layers), max_size=len(layers))))
    return replace(statement, operation=replace(operation, **{which: table}))


@st.composite
def programs(draw: st.DrawFn, model: Model, exact: bool = False, merging: bool = False) -> Program:
    """Statements without a conflict: adapters on different roles and on edges, factors, a pruning, a quantization, a
    prefix, and what of the base is trained, by which optimizer.

    exact: only what is an identity at the start. merging: only what promises to merge.
    """
    split = draw(st.integers(1, len(model.roles) - 1))
    roles = draw(st.permutations(model.roles))
    quantized = not merging and draw(st.booleans())
    made = [draw(statements(model, loras(exact, quantized), tuple(roles[:split])))]
    if draw(st.booleans()):
        made.append(draw(statements(model, loras(exact, quantized), tuple(roles[split:]))))
    made = [draw(tabled(statement, model)) for statement in made]
    # pissa and loftq take a part out of the weight, which is a conflict with masks
    free = all(not getattr(statement.operation, "from_weight", False) for statement in made)
    if free and draw(st.booleans()):
        sparse = not quantized and draw(st.booleans())
        made.append(draw(masked(model, sparses()) if sparse else statements(model, prunes())))
    if quantized:
        made.append(Statement(draw(quantizes()), Role("base")))
    if draw(st.booleans()):
        made.append(draw(statements(model, st.just(Ia3()))))
    if free and draw(st.booleans()):
        sparse = any(isinstance(statement.operation, Sparse) for statement in made)
        made += draw(trainings(model, quantized).filter(lambda said: not sparse or len(said) == 1))
    if draw(st.booleans()):
        made.append(Statement(draw(optimizes()), Union(())))
    if not merging and draw(st.booleans()):
        made += draw(bottlenecks(model))
    if not merging and not exact and draw(st.booleans()):
        made.append(Statement(draw(prefixes()), draw(st.just(Role("layers")) | layer_ranges(model.layers))))
    if not merging and not exact and draw(st.booleans()):
        made.append(Statement(draw(prompts()), Role("layers"), draw(st.sampled_from([None, "first"]))))
    return Program(tuple(draw(st.permutations(made))), seed=draw(st.integers(0, 9)))
