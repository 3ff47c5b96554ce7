"""Edges: each sub-layer's output as it is added to the residual stream, found by going back from every addition to it.

An edge is named after the module whose output it is: the innermost one that hands it out, be that a projection, a
dropout, a norm or a whole mixture of experts. What only passes a value on (a dropout written as a function, a scale) is
looked through.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from surgery.anatomy.flow import Flow
from surgery.anatomy.paths import within
from surgery.anatomy.probe import Unknown, shape_of
from surgery.anatomy.products import Product, operator_name
from surgery.anatomy.roles import Roles
from surgery.anatomy.trace import call_of, owner

ADDS = {"add", "add_"}
PASSES = {
    "dropout", "dropout_", "feature_dropout", "view", "reshape", "_unsafe_view", "contiguous", "clone", "to",
    "_to_copy", "type_as", "alias", "detach", "squeeze", "unsqueeze", "flatten", "unflatten", "mul", "mul_",
    "div", "div_",
}  # fmt: skip
SCALING = {"mul", "mul_", "div", "div_"}


@dataclass(frozen=True)
class Edge:
    """role: the sub-layer (`attn`, `cross`, `ffn`, `mixer`). node: its output where it is added to the stream.

    path: the module whose output it is; where none hands it out, the module in whose forward it is computed, and
    `inlined` is True. input: the module that takes the sub-layer's input; None where no module does. width: features.
    """

    role: str
    node: fx.Node
    path: str
    width: int
    input: str | None = None
    inlined: bool = False


class Edges:
    """Finds the edges of one traced model."""

    def __init__(self, roles: Roles) -> None:
        self.roles = roles
        self.flow: Flow = roles.flow
        self.trace = roles.flow.trace
        self.calls: dict[str, set[str]] = {}
        for node in self.trace.nodes:
            self.calls.setdefault(owner(node), set()).add(call_of(node))
        self.attention = {found.call.node: found.role for found in roles.attention}

    def find(self) -> list[Edge]:
        """All edges in execution order, each module once for each role."""
        found: dict[tuple[str, str], Edge] = {}
        for node in self.trace.nodes:
            if operator_name(node) not in ADDS or node not in self.flow.stream:
                continue
            for branch in self.branches(node):
                for role, value in self.sublayers(branch, node):
                    edge = self.edge(role, value, node)
                    if edge is not None:
                        found.setdefault((edge.role, edge.path), edge)
        return list(found.values())

    def only_adds(self, path: str) -> bool:
        """Whether what a layer hands on is what it reads, and what its sub-layers add to it."""
        inside = [node for node in self.trace.nodes if node in self.flow.stream and within(owner(node), path)]
        last = [node for node in inside if any(not within(owner(user), path) for user in self.trace.readers[node])]
        seen, waiting = set(last), list(last)
        while waiting:
            node = waiting.pop()
            if not within(owner(node), path):
                continue
            sources = [source for source in node.all_input_nodes if source in self.flow.stream]
            if operator_name(node) not in ADDS | PASSES - SCALING or len(sources) != 1:
                return False
            waiting += [source for source in sources if source not in seen]
            seen.update(sources)
        return bool(last)

    def branches(self, addition: fx.Node) -> Iterator[fx.Node]:
        """What an addition adds to the stream, where that is one thing."""
        operands = [node for node in addition.all_input_nodes if self.flow.reads[node]]
        if len(operands) == 2:
            carried = [node for node in operands if node in self.flow.stream]
            if len(carried) == 1:
                yield from (node for node in operands if node not in carried)

    def sublayers(self, value: fx.Node, reader: fx.Node) -> Iterator[tuple[str, fx.Node]]:
        """Sub-layers in a branch: one, or several that were added to each other first (parallel residuals)."""
        families = self.families(value, reader)
        if len(families) == 1:
            yield families.pop(), value
            return
        sum_ = value
        while families and self.before(sum_) is not None:
            sum_ = self.before(sum_)  # type: ignore[assignment]
        if not families or operator_name(sum_) not in ADDS:
            return
        for operand in sum_.all_input_nodes:
            if self.flow.reads[operand]:
                yield from self.sublayers(operand, sum_)

    def families(self, value: fx.Node, reader: fx.Node) -> set[str]:
        """Which sub-layers a value comes out of, by the last products and attention calls behind it."""
        products, calls, _ = self.flow.sources(value, reader)
        found = {self.attention[call.node] for call in calls if call.node in self.attention}
        for product in products:
            found |= self.families_of(product)
        return found

    def families_of(self, product: Product) -> set[str]:
        if product.kind == "experts":
            return {"ffn"}
        names = {"experts": "ffn", "router": "ffn"}
        roles = {role.partition(".")[0] for role in self.roles.roles_of(product)}
        return {names.get(role, role) for role in roles} & {"attn", "cross", "ffn", "mixer"}

    def before(self, node: fx.Node) -> fx.Node | None:
        """What a node passes on, feature by feature; None for one that computes something."""
        if operator_name(node) not in PASSES:
            return None
        sources = [source for source in node.all_input_nodes if self.flow.reads[source]]
        if len(sources) != 1 or sources[0] in self.flow.stream:
            return None
        try:
            return sources[0] if shape_of(sources[0])[-1:] == shape_of(node)[-1:] else None
        except Unknown:
            return None

    def edge(self, role: str, value: fx.Node, addition: fx.Node) -> Edge | None:
        """The edge whose value this is, at the module that gives it; the first of several before it that is one."""
        try:
            width = shape_of(value)[-1]
        except (Unknown, IndexError):
            return None
        taken = self.input(value)
        node: fx.Node | None = value
        reader = addition
        while node is not None:
            path = owner(node)
            if path and not within(owner(reader), path) and self.called_once(path):
                return Edge(role, value, path, width, taken)
            reader, node = node, self.before(node)
        return Edge(role, value, owner(value), width, taken, inlined=True)

    def called_once(self, path: str) -> bool:
        """Whether a module runs once for each run of the module that holds it, as far as it leaves a trace."""
        outer = path.rpartition(".")[0]
        while outer and outer not in self.calls:
            outer = outer.rpartition(".")[0]
        return len(self.calls[path]) <= max(1, len(self.calls.get(outer, ())))

    def input(self, value: fx.Node) -> str | None:
        """The module that takes what the sub-layer reads of the stream: the first one behind the edge that does.

        A mixture of experts also picks, repeats and weighs its tokens: what it reads has as many numbers as it gives.
        """
        seen, waiting, found = {value}, [value], list[tuple[int, str]]()
        while waiting:
            node = waiting.pop()
            for source in self.trace.reads[node]:
                if not self.flow.reads[source] or source in seen:
                    continue
                if source not in self.flow.stream:
                    seen.add(source)
                    waiting.append(source)
                    continue
                path = owner(node)
                if (
                    node in self.flow.at
                    and path
                    and self.called_once(path)
                    and self.comes_in(source, path)
                    and alike(source, value)
                ):
                    found.append((self.trace.order[node], path))
        return min(found)[1] if found else None

    def comes_in(self, node: fx.Node, path: str) -> bool:
        """Whether a value of the stream is what a module was called with, at most reshaped inside it."""
        while within(owner(node), path):
            sources = [source for source in node.all_input_nodes if self.flow.reads[source]]
            if operator_name(node) not in PASSES or len(sources) != 1:
                return False
            node = sources[0]
        return True


def alike(one: fx.Node, other: fx.Node) -> bool:
    """Whether two values hold as many tokens of the same width."""
    try:
        a, b = shape_of(one), shape_of(other)
    except Unknown:
        return False
    return a[-1:] == b[-1:] and math.prod(a) == math.prod(b)
