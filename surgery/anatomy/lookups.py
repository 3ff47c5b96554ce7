"""Lookups and norms: what indices a lookup takes, and which stored vectors scale a normalised activation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from surgery.anatomy.flow import Flow
from surgery.anatomy.probe import Unknown, shape_of
from surgery.anatomy.products import Product, operator_name
from surgery.anatomy.roles import Roles
from surgery.anatomy.trace import owner

NORMS = {"layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm", "group_norm", "batch_norm"}
STATISTICS = {"mean", "var", "var_mean", "rsqrt", "std", "linalg_vector_norm", "norm", "sqrt"}


def embeddings(roles: Roles) -> Iterator[tuple[str, Product]]:
    """Role of each lookup: `embed` reads what the user gave, `position` counts; others are a plain `lookup`."""
    seen = set()
    for product in roles.flow.products:
        place = (product.path, product.parameter)
        if product.kind == "lookup" and place not in seen:
            seen.add(place)
            yield lookup_role(roles, product), product


def lookup_role(roles: Roles, product: Product) -> str:
    flow, probe = roles.flow, roles.probe
    given = {node: value for node, value in flow.trace.given.items() if not value.is_floating_point()}
    try:
        moved = {node: value.roll(1, -1) + 1 if value.dtype != torch.bool else value for node, value in given.items()}
        before, after = (probe.run([product.input], known)[0] for known in (given, moved))
    except Unknown:
        return "embed" if flow.indices[product.input] else "lookup"
    if not torch.equal(before, after):
        return "embed"
    counters = [node for node in ancestors(flow, product.input) if node in flow.trace.weights]
    if counters:
        # The values of a buffer are not known; one that counts is no longer than the table it indexes.
        longest = max(max(shape_of(node), default=0) for node in counters)
        return "position" if longest <= product.shape[0] else "lookup"
    # Positions differ along the sequence, the few kinds of a segment do not; a table read whole is a set of vectors.
    if before.numel() == product.shape[0]:
        return "lookup"
    return "position" if before.dim() and len(before.unique()) >= max(before.shape[-1], 2) else "lookup"


def ancestors(flow: Flow, node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        here = waiting.pop()
        if here not in found:
            found.add(here)
            waiting.extend(flow.trace.reads[here])
    return found


def norms(flow: Flow) -> Iterator[tuple[fx.Node, str, str, int, str | None]]:
    """(node, module path, parameter, width, bias) of each norm with a stored scale."""
    seen = set()
    for node in flow.trace.nodes:
        found = norm(flow, node)
        if found is None:
            continue
        weight, bias = found
        path, _, parameter = flow.stores.name(weight, node).rpartition(".")
        if (path, parameter) not in seen:
            seen.add((path, parameter))
            where, _, name = flow.stores.name(bias, node).rpartition(".") if bias is not None else ("", "", "")
            yield node, path, parameter, shape_of(weight)[0], name if bias is not None and where == path else None


def norm(flow: Flow, node: fx.Node) -> tuple[fx.Node, fx.Node | None] | None:
    """Weight and bias of a norm that ends at this node."""
    name = operator_name(node)
    trace = flow.trace
    if name in NORMS:
        held = [vector(flow, arg) for arg in node.args[1:] if isinstance(arg, fx.Node)]
        vectors = [place for place in held if place is not None]
        return (vectors[0], vectors[1] if len(vectors) > 1 else None) if vectors else None
    if name != "mul":
        return None
    for one, other in (node.args[:2], node.args[1::-1]):
        if not isinstance(one, fx.Node) or not isinstance(other, fx.Node):
            continue
        weight = vector(flow, one)
        if weight is None or not flow.reads[other] or not normalised(flow, other, owner(node)):
            continue
        adds = [user for user in node.users if operator_name(user) == "add" and owner(user) == owner(node)]
        biases = [
            vector(flow, arg) for user in adds for arg in user.args if isinstance(arg, fx.Node) and arg is not node
        ]
        found = [bias for bias in biases if bias is not None and bias in trace.weights]
        return weight, found[0] if found else None
    return None


def vector(flow: Flow, node: fx.Node) -> fx.Node | None:
    """The stored vector behind a node, also through `1 + weight`."""
    if flow.reads.get(node):
        return None
    if operator_name(node) == "add":
        inner = [arg for arg in node.args if isinstance(arg, fx.Node)]
        return vector(flow, inner[0]) if len(inner) == 1 else None
    while node not in flow.trace.parameters:
        if len(node.all_input_nodes) != 1 or node.op != "call_function":
            return None
        if operator_name(node) == "add":
            return vector(flow, node)
        node = node.all_input_nodes[0]
    return node if len(shape_of(node)) == 1 else None


def normalised(flow: Flow, node: fx.Node, module: str) -> bool:
    """A statistic is taken among what the same module computed before."""
    seen, waiting = {node}, [node]
    while waiting:
        here = waiting.pop()
        if operator_name(here) in STATISTICS:
            return True
        for source in flow.trace.reads[here]:
            if source not in seen and owner(source) == module and source not in flow.boundaries:
                seen.add(source)
                waiting.append(source)
    return False
