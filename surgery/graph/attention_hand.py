"""Attention computed by hand: the scores of a prefix, scaled as the model scales its own but never masked."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from surgery.errors import GraphError
from surgery.graph.attention_math import like
from surgery.graph.attention_trace import NUMBER, scale_chain

MASKING: set[Any] = {
    operator.add,
    operator.iadd,
    operator.sub,
    torch.add,
    torch.sub,
    torch.masked_fill,
    torch.where,
    "add",
    "add_",
    "sub",
    "masked_fill",
    "masked_fill_",
    "where",
}


OF_EACH: set[Any] = {
    torch.exp,
    torch.clamp,
    "exp",
    "clamp",
    "abs",
    "sigmoid",
    "sqrt",
    "to",
    "float",
}  # number by number


def scores_of(query: Tensor, prefix: Tensor, heads: int) -> Tensor:
    """query @ prefix^T for each head: (..., queries, n)."""
    return torch.matmul(query, like(prefix, query, heads).transpose(-2, -1))


def scaled_scores(scores: fx.Node, key: fx.Node, heads: int, path: str, call: Callable[..., fx.Node]) -> fx.Node:
    """The prefix's scores as the softmax reads them: the model's own chain of scalings again, without its masks.

    scores: what the softmax reads. Raises GraphError S344 at a step that is neither a scaling nor a mask.
    """
    product, *steps = scale_chain(scores)
    result = call(scores_of, product.args[0], key, heads)
    before = product
    for step in steps:
        others = [each for each in step.all_input_nodes if each is not before]
        if all(_is_number(each) for each in others):
            result = _again(step, before, result, result)
        elif step.target not in MASKING:
            raise GraphError.of(
                "S344",
                f"the attention at {path} changes its scores by neither a scale nor a mask: `{step.format_node()}`",
                help="use F.scaled_dot_product_attention there",
            )
        before = step
    return result


def weighted(core: fx.Node, out: fx.Node, scores: fx.Node, value: fx.Node, after: fx.Node) -> fx.Node:
    """The model's own softmax, dropout and product again, over other scores and values; put behind a node."""
    result, old, last = scores, core.args[0], after
    for step in (core, *_between(core, out)):
        result = last = _again(step, old, result, last)
        old = step
    return _again(out, old, result, last, value)


def _again(step: fx.Node, old: Any, new: fx.Node, after: fx.Node, value: fx.Node | None = None) -> fx.Node:
    """A copy of a node, put behind another, that reads `new` where it read `old` (and `value` elsewhere, if given)."""
    with after.graph.inserting_after(after):
        copied = after.graph.node_copy(step, lambda each: new if each is old else value or each)
    copied.meta = {"statement": new.meta["statement"]}
    return copied


def _between(core: fx.Node, out: fx.Node) -> tuple[fx.Node, ...]:
    """Nodes after the softmax and before its product with the values."""
    chain: list[fx.Node] = []
    node: Any = out.args[0]
    while node is not core:
        chain.insert(0, node)
        node = node.args[0]
    return tuple(chain)


def _is_number(node: fx.Node) -> bool:
    """Whether a node's value is a number (or several) got from sizes and constants, the same for every key."""
    if NUMBER in node.meta or node.target == "size" or (node.target is getattr and node.args[1] == "shape"):
        return True
    of_numbers = getattr(node.target, "__module__", "") in ("math", "_operator", "builtins")
    sources = node.all_input_nodes
    if node.target in OF_EACH:
        return all(map(_is_number, sources))
    return node.op == "call_function" and of_numbers and bool(sources) and all(map(_is_number, sources))
