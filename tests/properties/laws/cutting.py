"""Laws of units that are cut out: as many as asked for, the least ones, and what is left is the masked whole."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import surgery
from surgery.language import parse
from surgery.language.program import Program
from tests.properties.case import Case, Law
from tests.properties.drawn import cases
from tests.reference_decoder import ReferenceDecoder
from tests.strategies import Model

Lines = list[tuple[Tensor, Tensor]]  # (a tensor, to which unit each index of an axis belongs), the axis first


def neurons(model: Model) -> st.SearchStrategy[Program]:
    shares, ways = st.integers(1, 88), st.sampled_from(["", " by random"])
    return st.builds(lambda share, way: parse(f"prune neurons {share}%{way} on ffn"), shares, ways)


@st.composite
def heads(draw: st.DrawFn, model: Model) -> Program:
    """Whole groups where there are several, else query heads: shares that can be had, and some that cannot."""
    groups, each = model.shape.key_value_heads, model.shape.heads // model.shape.key_value_heads
    query = each > 1 and (groups == 1 or draw(st.booleans()))
    of = each if query else groups
    share = 100 * draw(st.integers(0, of - 1)) / of
    way = draw(st.sampled_from(["", " by random"]))
    return parse(f"prune heads {share + draw(st.sampled_from([0, 3]))}%{way}{' query' * query} nearest on attn")


def channels(model: Model) -> st.SearchStrategy[Program]:
    shares, ways = st.integers(1, 80), st.sampled_from(["", " by random", " round to 2 nearest"])
    return st.builds(lambda share, way: parse(f"prune channels {share}%{way}"), shares, ways)


def _neurons(model: ReferenceDecoder) -> list[tuple[int, Lines]]:
    """By layer, how many neurons there are, and all that belongs to them."""
    found = []
    for layer in model.layers:
        ffn: Any = layer.ffn
        ways = [ffn.up, ffn.gate] if model.shape.gated else [ffn.up]
        tensors = [ffn.down.weight.t()] + [tensor for way in ways for tensor in (way.weight, way.bias)]
        unit = torch.arange(model.shape.ffn)
        found.append((model.shape.ffn, [(tensor, unit) for tensor in tensors if tensor is not None]))
    return found


def _heads(model: ReferenceDecoder) -> list[tuple[int, Lines]]:
    """By layer, query heads: rows of q and columns of o are one's own; those of k and v are all those's of a group."""
    shape, found = model.shape, []
    for layer in model.layers:
        attention: Any = layer.attention
        unit = torch.arange(shape.heads).repeat_interleave(shape.head_width)
        q = attention.qkv if shape.fused else attention.q
        tensors = [attention.o.weight.t(), q.weight[: shape.width], None if q.bias is None else q.bias[: shape.width]]
        found.append((shape.heads, [(tensor, unit) for tensor in tensors if tensor is not None]))
    return found


def _channels(model: ReferenceDecoder) -> list[tuple[int, Lines]]:
    """Once, all that reads or writes the stream."""
    shape = model.shape
    tensors = [model.embed.weight.t(), model.norm.weight, *([] if shape.tied else [model.head.weight.t()])]
    tensors += [] if model.position is None else [model.position.weight.t()]
    for layer in model.layers:
        attention: Any = layer.attention
        ffn: Any = layer.ffn
        read = [attention.qkv] if shape.fused else [attention.q, attention.k, attention.v]
        read += [ffn.up, ffn.gate] if shape.gated else [ffn.up]
        tensors += [way.weight.t() for way in read] + [layer.attention_norm.weight, layer.ffn_norm.weight]  # type: ignore[union-attr, list-item]
        tensors += [each for way in (attention.o, ffn.down) for each in (way.weight, way.bias) if each is not None]
    return [(shape.width, [(tensor, torch.arange(shape.width)) for tensor in tensors])]


UNITS = {"prune neurons": _neurons, "prune heads": _heads, "prune channels": _channels}


@torch.no_grad()
def what_is_left_is_the_masked_whole(case: Case) -> None:
    """Exact counts; the least sums of |w| go, the first of equal ones; outputs agree, and are others than before."""
    (statement,) = case.program.statements
    operation: Any = statement.operation
    whole = case.build()
    base, small = case.run(whole), case.build()
    plan = case.plan(model=small)
    surgery.apply(plan, small, example_inputs=(case.model.tokens,))
    gone = 0
    for index, (count, lines) in enumerate(UNITS[operation.verb](whole)):
        place = -1 if operation.verb == "prune channels" else index
        kept = _kept(whole, small, operation.verb, place)
        assert len(kept) == _wanted(case, operation, count)
        gone += count - len(kept)
        scores = torch.zeros(count, dtype=torch.float64)
        for tensor, unit in lines:
            scores.index_add_(0, unit, tensor.abs().reshape(len(unit), -1).sum(1))
        if operation.by == "magnitude":
            assert kept == _best(case, operation, scores, whole, index, len(kept))
        out = torch.tensor([unit not in kept for unit in range(count)])
        for tensor, unit in lines:
            tensor[out[unit]] = 0
    found = case.run(small)
    assert (found - case.run(whole)).abs().max() < 1e-10
    assert torch.equal(found, base) == (gone == 0)
    assert (f"{operation.verb.removeprefix('prune ')} at " in str(plan)) == (gone > 0)
    now, before = (sum(tensor.numel() for tensor in model.parameters()) for model in (small, whole))
    assert (now < before) == (gone > 0)


def _kept(whole: ReferenceDecoder, small: Any, verb: str, layer: int) -> list[int]:
    """Units whose columns the smaller model has, found in a matrix that it did not rescale."""
    if verb == "prune channels":
        wide, narrow, size = whole.embed.weight, small.embed.weight, 1
    elif verb == "prune heads":
        wide, narrow = whole.layers[layer].attention.o.weight, small.layers[layer].attention.o.weight  # type: ignore[union-attr, assignment]
        size = whole.shape.head_width
    else:
        wide, narrow, size = whole.layers[layer].ffn.down.weight, small.layers[layer].ffn.down.weight, 1  # type: ignore[union-attr, assignment]
    order = [next(i for i in range(wide.shape[1]) if torch.equal(wide[:, i], column)) for column in narrow.t()]
    units = [column // size for column in order[::size]]
    assert order == [unit * size + i for unit in units for i in range(size)]
    return units


def _wanted(case: Case, operation: Any, count: int) -> int:
    """How many stay, counted by hand."""
    share, shape = operation.share, case.model.shape
    if operation.verb == "prune heads":
        each = shape.heads // shape.key_value_heads
        query = operation.query or shape.key_value_heads == 1
        of, times = (each, shape.key_value_heads) if query else (shape.key_value_heads, each)
        return times * min(range(1, of + 1), key=lambda left: (abs(left - of * (1 - share)), -left))
    step = 1 if operation.round_ is None else 2
    left = count - round(share * count)
    return min(range(step, count + 1, step), key=lambda each: (abs(each - left), -each))


def _best(case: Case, operation: Any, scores: Tensor, whole: Any, layer: int, left: int) -> list[int]:
    """The largest scores, of equal ones the last; of each group as many, or whole groups with what they share."""
    shape = case.model.shape
    if operation.verb != "prune heads":
        return _largest(scores, left)
    groups, each = shape.key_value_heads, shape.heads // shape.key_value_heads
    if operation.query or groups == 1:
        best = [_largest(scores[group * each :][:each], left // groups) for group in range(groups)]
        return [group * each + unit for group, units in enumerate(best) for unit in units]
    totals = scores.view(groups, each).sum(1)
    attention = whole.layers[layer].attention
    for way in range(2):  # keys, then values
        if shape.fused:
            start = shape.width + way * groups * shape.head_width
            rows = slice(start, start + groups * shape.head_width)
            tensors = [attention.qkv.weight[rows], None if attention.qkv.bias is None else attention.qkv.bias[rows]]
        else:
            tensors = [(attention.k, attention.v)[way].weight, (attention.k, attention.v)[way].bias]
        for tensor in filter(lambda each: each is not None, tensors):
            totals += tensor.abs().reshape(groups, -1).sum(1)
    return [group * each + i for group in _largest(totals, left // each) for i in range(each)]


def _largest(scores: Tensor, count: int) -> list[int]:
    order = sorted(range(len(scores)), key=lambda index: (float(scores[index]), index))
    return sorted(order[len(scores) - count :])


LAWS: tuple[Law, ...] = (
    Law("neurons", "fewer neurons are the masked whole", what_is_left_is_the_masked_whole, cases(neurons), cost=2),
    Law("heads", "fewer heads are the masked whole", what_is_left_is_the_masked_whole, cases(heads), cost=2),
    Law("channels", "fewer channels are the masked whole", what_is_left_is_the_masked_whole, cases(channels), cost=2),
)
