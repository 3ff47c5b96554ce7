"""What a module computes, as a small graph: `linear(x, weight, bias)` or `embedding(ids, weight)`, tensors by name.

Plain maps are written down directly. Anything with a forward of its own is traced, so that what it really computes is
what is rewritten and merged, and refused where it cannot be traced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from surgery.errors import GraphError

PRODUCTS = (F.linear, torch.matmul, torch.addmm)
BOOKKEEPING = {"size", "view", "reshape", "getitem", "add", "getattr"}


@dataclass
class Captured:
    """A graph and its landmarks.

    input: the placeholder. product: the linear or embedding node. weight: its operand, (out, in) for a linear map.
    stored: the get_attr node under `weight`. output: the value that the module gives.
    plain: the module's own forward does just this, so that it can hold another weight of the same shape.
    """

    graph: fx.Graph
    input: fx.Node
    product: fx.Node
    weight: fx.Node
    stored: fx.Node
    output: fx.Node
    plain: bool = True


def capture(module: nn.Module, path: str, parameter: str = "weight") -> Captured:
    """The graph of a projection or lookup.

    Raises GraphError S301 when the module cannot be traced, S302 when it has no single product with that parameter.
    """
    forward = type(module).forward
    if forward is nn.Linear.forward and parameter == "weight":
        return _linear(bias=module.bias is not None, transposed=False)
    if forward is nn.Embedding.forward and parameter == "weight" and module.max_norm is None:
        return _embedding()
    try:
        traced = fx.Tracer(autowrap_functions=()).trace(module)
    except Exception as error:
        raise GraphError.of(
            "S301",
            f"cannot trace `{type(module).__name__}` at {path}: {error}",
            help="its forward decides on values; leave it out with `except`, or rewrite it without such a decision",
        ) from None
    found = _landmarks(traced, parameter)
    if found is None:
        raise GraphError.of(
            "S302",
            f"`{type(module).__name__}` at {path} does not use `{parameter}` in one linear product or lookup",
            help=f'leave it out with `except "{path}"`',
        )
    if _is_plain(found):
        return _linear(bias=found.product.args[0] is not None, transposed=True)
    return found


def _linear(bias: bool, transposed: bool) -> Captured:
    graph = fx.Graph()
    x = graph.placeholder("x")
    stored = weight = graph.get_attr("weight")
    if transposed:
        weight = graph.call_function(torch.t, (stored,))
    product = graph.call_function(F.linear, (x, weight, graph.get_attr("bias") if bias else None))
    graph.output(product)
    return Captured(graph, x, product, weight, stored, product)


def _embedding() -> Captured:
    graph = fx.Graph()
    ids = graph.placeholder("input")
    weight = graph.get_attr("weight")
    product = graph.call_function(F.embedding, (ids, weight))
    graph.output(product)
    return Captured(graph, ids, product, weight, weight, product)


def _landmarks(graph: fx.Graph, parameter: str) -> Captured | None:
    stored = [node for node in graph.nodes if node.op == "get_attr" and node.target == parameter]
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if len(stored) != 1 or not inputs:
        return None
    for node in graph.nodes:
        for place, operand in enumerate(node.args):
            if node.target in (*PRODUCTS, F.embedding) and isinstance(operand, fx.Node) and _reads(operand, stored[0]):
                x = node.args[0] if node.target is not torch.addmm else node.args[1]
                if place == 0 or not isinstance(x, fx.Node):
                    continue
                if node.target is F.linear:
                    node.args, node.kwargs = (x, operand, (*node.args, node.kwargs.get("bias"))[2]), {}
                (output,) = (n for n in graph.nodes if n.op == "output")
                result: Any = output.args[0]
                return Captured(graph, inputs[0], node, operand, stored[0], result, plain=False)
    return None


def _reads(node: fx.Node, wanted: fx.Node) -> bool:
    """Whether a value is computed from the wanted one and no input."""
    if node is wanted:
        return True
    return node.op == "call_function" and any(_reads(source, wanted) for source in node.all_input_nodes)


def _is_plain(found: Captured) -> bool:
    """Conv1D's way of writing a linear map: addmm of the flattened input, with only bookkeeping around it."""
    product = found.product
    if product.target is not torch.addmm or found.weight is not found.stored or found.stored.target != "weight":
        return False
    bias = product.args[0]
    if not (isinstance(bias, fx.Node) and bias.op == "get_attr" and bias.target == "bias"):
        return False
    others = [n for n in found.graph.nodes if n.op in ("call_function", "call_method") and n is not product]
    return all(getattr(n.target, "__name__", str(n.target)) in BOOKKEEPING for n in others)
