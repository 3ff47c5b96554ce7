"""Dependencies that an in-place operator makes: who reads a tensor after something else wrote into it.

The exported graph keeps `new_empty`, `copy_` into its slices, and reads of the whole; operands alone do not tell.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

Reads = dict[fx.Node, list[fx.Node]]
Writes = dict[tuple[fx.Node, fx.Node], list[fx.Node]]


def dependencies(nodes: list[fx.Node]) -> tuple[Reads, Writes]:
    """What each node reads: operands, and what wrote into their memory before; the latter also by (node, operand)."""
    owner = owners(nodes)
    writers: dict[fx.Node, list[fx.Node]] = {}
    reads: Reads = {}
    writes: Writes = {}
    for node in nodes:
        operands = list(node.all_input_nodes)
        found = list(operands)
        for operand in operands:
            earlier = [w for w in writers.get(owner.get(operand, operand), ()) if w is not operand]
            if earlier:
                writes[node, operand] = earlier
                found += [writer for writer in earlier if writer not in found]
        reads[node] = found
        for target in targets(node):
            writers.setdefault(owner.get(target, target), []).append(node)
    return reads, writes


def written(nodes: list[fx.Node]) -> frozenset[fx.Node]:
    """What is written into, by itself or through something that shares its memory."""
    owner = owners(nodes)
    return frozenset(owner.get(target, target) for node in nodes for target in targets(node))


def owners(nodes: list[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Of every view, and every view of a view, whose memory it shares. nodes: in the order in which they run."""
    owner: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        aliased = viewed(node)
        if aliased is not None:
            owner[node] = owner.get(aliased, aliased)
    return owner


def viewed(node: fx.Node) -> fx.Node | None:
    """The operand whose memory a node's result may share."""
    target: Any = node.target
    if target is operator.getitem:
        return node.args[0] if isinstance(node.args[0], fx.Node) else None
    schema = getattr(target, "_schema", None)
    if schema is None or not any(result.alias_info is not None for result in schema.returns):
        return None
    for place, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and place < len(node.args):
            held = node.args[place]
            return held if isinstance(held, fx.Node) else None
    return None


def targets(node: fx.Node) -> list[fx.Node]:
    """Operands that an in-place operator writes into."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    found = []
    for place, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            held = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
            if isinstance(held, fx.Node):
                found.append(held)
    return found
