"""From the graph that methods write to the graph that runs: neighbouring nodes become one where one is faster.

The canonical graph says `linear`, `dequantize`, `low_rank` and `add` as methods wrote them. Here a frozen linear map
and the low-rank branch on its output become one function with its own gradient, and a linear map over codes one
that dequantizes again in the backward pass. The value is the same; the canonical graph is kept for later edits.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import fx

from surgery.graph.codes import DEQUANTIZE, quantized_linear
from surgery.graph.functions import add_branch, linear_as, low_rank, low_rank_linear


def lower(full: fx.Graph) -> fx.Graph:
    """A copy to run."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(full, {}))
    for node in list(graph.nodes):
        if node.target is F.linear or node.target is linear_as:
            _over_codes(graph, node)
    for node in list(graph.nodes):
        if node.target is add_branch:
            _with_low_rank(graph, node)
    graph.lint()
    return graph


def _replace(graph: fx.Graph, node: fx.Node, target: object, args: tuple[object, ...]) -> None:
    with graph.inserting_before(node):
        new = graph.call_function(target, args)  # type: ignore[arg-type]
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _over_codes(graph: fx.Graph, node: fx.Node) -> None:
    """linear(x, dequantize(state), bias) -> quantized_linear(x, bias, compute, state)"""
    x, weight, bias = (*node.args, None)[:3]
    if not isinstance(weight, fx.Node) or weight.target not in DEQUANTIZE:
        return
    compute = node.args[3] if node.target is linear_as else None
    _replace(graph, node, quantized_linear, (x, bias, compute, *weight.args))
    if not weight.users:
        graph.erase_node(weight)


def _with_low_rank(graph: fx.Graph, node: fx.Node) -> None:
    """add_branch(linear(x, weight, bias), low_rank(x, a, b, scale)) -> low_rank_linear(...), for the same x"""
    base, branch = node.args
    if not (isinstance(base, fx.Node) and isinstance(branch, fx.Node)):
        return
    if base.target is not F.linear or branch.target is not low_rank or base.args[0] is not branch.args[0]:
        return
    if len(base.users) > 1 or len(branch.users) > 1:
        return
    x, weight, bias = (*base.args, None)[:3]
    _replace(graph, node, low_rank_linear, (x, weight, bias, *branch.args[1:]))
    graph.erase_node(base)
    graph.erase_node(branch)
