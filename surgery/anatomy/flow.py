"""Facts of an exported graph in one forward pass: what depends on which input, and where the residual stream runs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import fx

from surgery.anatomy.probe import dtype_of
from surgery.anatomy.products import Product, Products, operator_name
from surgery.anatomy.stacks import Lists
from surgery.anatomy.trace import Trace, owner

MAKES_NEW = {
    "new_zeros", "new_ones", "new_empty", "new_full", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like",
}  # fmt: skip
LIKE_SECOND = {"type_as", "expand_as", "view_as", "reshape_as"}
MULTIPLIES = {"matmul", "bmm", "einsum", "baddbmm", "mm"}


@dataclass(eq=False)
class Call:
    """One attention call: softmax(query key) value, whatever computes it.

    node gives the output; query, key and value are the operands' nodes (several where scores are computed in pieces).
    scores: the products of query and key; empty for `scaled_dot_product_attention`, whose node does everything.
    """

    node: fx.Node
    query: list[fx.Node]
    key: list[fx.Node]
    value: list[fx.Node]
    softmax: fx.Node
    scores: list[fx.Node]

    @property
    def path(self) -> str:
        return owner(self.node)


class Flow:
    """Products, attention calls and dependencies of one trace.

    reads[node]: bits of the user inputs whose embedded (or floating) values reach the node.
    stream: nodes that carry the residual stream or what is computed from it without a stored matrix.
    """

    def __init__(self, trace: Trace, lists: Lists) -> None:
        self.trace = trace
        self.lists = lists
        self.stores = Products(trace)
        self.products = self.stores.find()
        self.at = {product.node: product for product in self.products}
        self.flows = {node: carriers(node, sources) for node, sources in trace.reads.items()}
        self.reads: dict[fx.Node, int] = {}
        self.indices: dict[fx.Node, int] = {}
        self.depend()
        self.calls = self.find_calls()
        self.boundaries = set(self.at) | {call.node for call in self.calls}
        self.stream = self.find_stream(set())
        kept = [call for call in self.calls if self.projected(call)]
        if len(kept) < len(self.calls):
            self.calls = kept
            self.boundaries = set(self.at) | {call.node for call in self.calls}
            self.stream = self.find_stream(set())
        inner = self.inner_streams()
        if inner:
            self.stream = self.find_stream(inner)

    def depend(self) -> None:
        bits = {node: 1 << place for place, node in enumerate(self.trace.given)}
        computed: set[fx.Node] = set()
        for node in self.trace.nodes:
            indices = reads = 0
            if node in self.at and self.at[node].kind == "lookup" and self.at[node].input in computed:
                # Rows picked by what the model computed (an expert's bias), not by what it was given.
                self.products.remove(self.at.pop(node))
            if node in self.at or any(source in computed for source in self.trace.reads[node]):
                computed.add(node)
            for source in self.trace.reads[node]:
                indices |= self.indices[source]
            for source in self.flows[node]:
                reads |= self.reads[source]
            if node in bits:
                if self.trace.given[node].is_floating_point():
                    reads = bits[node]
                else:
                    indices = bits[node]
            product = self.at.get(node)
            if product is not None and product.kind == "lookup":
                reads |= self.indices[product.input]
            self.indices[node], self.reads[node] = indices, reads

    def find_calls(self) -> list[Call]:
        calls = []
        for node in self.trace.nodes:
            name = operator_name(node)
            if name == "scaled_dot_product_attention":
                q, k, v = node.args[:3]
                calls.append(Call(node, [q], [k], [v], node, []))  # type: ignore[list-item]
            elif name in ("softmax", "_softmax", "_safe_softmax"):
                calls.extend(self.by_hand(node))
        return calls

    def by_hand(self, softmax: fx.Node) -> list[Call]:
        """Calls whose weights come from this softmax: scores on one side, a product with the values on the other."""
        scores = self.behind(softmax)
        if not scores:
            return []
        calls = []
        for product, weights in self.ahead(softmax):
            operands = self.operands(product)
            values = [operand for operand in operands if operand is not weights]
            if len(operands) == 2 and len(values) == 1 and self.reads[values[0]]:
                query, key = [], []
                for score in scores:
                    left, right = self.operands(score)
                    query.append(left)
                    key.append(right)
                calls.append(Call(product, query, key, values, softmax, scores))
        return calls

    def projected(self, call: Call) -> bool:
        """Whether anything is projected for a call; a weighing of earlier layers' states is a part of the stream."""
        groups = (call.query, call.key, call.value)
        return any(self.sources(node, call.node)[0] for nodes in groups for node in nodes)

    def operands(self, node: fx.Node) -> list[fx.Node]:
        """The two tensors that a product multiplies."""
        if operator_name(node) == "einsum":
            return [operand for operand in node.args[1] if isinstance(operand, fx.Node)]  # type: ignore[union-attr]
        start = 1 if operator_name(node) == "baddbmm" else 0
        return [operand for operand in node.args[start : start + 2] if isinstance(operand, fx.Node)]

    def behind(self, softmax: fx.Node) -> list[fx.Node]:
        """Products of two activations whose results reach the softmax without another matrix between."""
        found, seen, waiting = [], set(), [softmax]
        while waiting:
            node = waiting.pop()
            for source in self.flows[node]:
                if source in seen or not self.reads[source] or source in self.at:
                    continue
                seen.add(source)
                operands = self.operands(source) if operator_name(source) in MULTIPLIES else []
                if len(operands) == 2 and all(self.reads[operand] for operand in operands):
                    found.append(source)
                elif operator_name(source) not in ("softmax", "_softmax", "scaled_dot_product_attention"):
                    waiting.append(source)
        return sorted(found, key=lambda n: self.trace.order[n])

    def ahead(self, softmax: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
        """Products that the softmax's result enters, with the operand it enters by."""
        found, seen, waiting = [], {softmax}, [softmax]
        while waiting:
            node = waiting.pop()
            for user in self.trace.readers[node]:
                if user in seen or user in self.at or user.op != "call_function":
                    continue
                if operator_name(user) in MULTIPLIES:
                    found.append((user, node))
                    continue
                if operator_name(user) in ("softmax", "_softmax", "topk"):
                    continue
                seen.add(user)
                waiting.append(user)
        return sorted(found, key=lambda pair: self.trace.order[pair[0]])

    def find_stream(self, seeds: set[fx.Node]) -> set[fx.Node]:
        stream: set[fx.Node] = set()
        places = {node: self.lists.place(owner(node)) for node in self.trace.nodes}
        for node in self.trace.nodes:
            product = self.at.get(node)
            if product is not None and product.kind == "lookup":
                if self.reads[node]:
                    stream.add(node)
                continue
            outside = places[node] is None and self.reads[node] != 0
            enters = outside and any(places[user] is not None for user in self.trace.readers[node])
            given = node in self.trace.given and self.reads[node] != 0
            follows = node not in self.boundaries and any(source in stream for source in self.flows[node])
            if enters or given or follows or node in seeds:
                stream.add(node)
        return stream

    def inner_streams(self) -> set[fx.Node]:
        """Residual streams behind a projection (a bottleneck's): sums of a tensor and a projection of it."""
        seeds: set[fx.Node] = set()
        for node in self.trace.nodes:
            if operator_name(node) not in ("add", "add_") or node in self.stream or len(node.all_input_nodes) != 2:
                continue
            for branch, straight in (node.all_input_nodes, node.all_input_nodes[::-1]):
                products, calls, _ = self.sources(branch)
                if calls or len(products) != 1 or not self.reads[straight]:
                    continue
                if straight in self.behind_all(products[0].input) and straight not in self.boundaries:
                    seeds.add(straight)
        return seeds

    def behind_all(self, node: fx.Node) -> set[fx.Node]:
        """Everything a node depends on, within its layer."""
        place = self.lists.place(owner(node))
        seen, waiting = {node}, [node]
        while waiting:
            for source in self.flows[waiting.pop()]:
                if source not in seen and self.reads[source] and self.lists.place(owner(source)) == place:
                    seen.add(source)
                    waiting.append(source)
        return seen

    def composed(self, node: fx.Node) -> bool:
        """Whether a matrix made of several stored ones lies between a node and the products behind it."""
        seen, waiting = {node}, [node]
        while waiting:
            here = waiting.pop()
            if here in self.boundaries or here in self.stream:
                continue
            operands = self.operands(here) if operator_name(here) in MULTIPLIES | {"linear"} else []
            if len(operands) == 2 and bool(self.reads[operands[0]]) != bool(self.reads[operands[1]]):
                return True
            for source in self.flows[here]:
                if source not in seen and self.reads[source]:
                    seen.add(source)
                    waiting.append(source)
        return False

    def sources(self, node: fx.Node, reader: fx.Node | None = None) -> tuple[list[Product], list[Call], bool]:
        """What computes a node (as its reader finds it): products and calls behind it; whether the stream is too."""
        products, calls, streams = [], [], False
        by_node = self.call_at
        waiting = [node, *(self.trace.writes.get((reader, node), ()) if reader is not None else ())]
        seen = set(waiting)
        while waiting:
            here = waiting.pop()
            if here in self.stream:
                streams = True
                continue
            if here in by_node:
                calls.append(by_node[here])
                continue
            if here in self.at:
                products.append(self.at[here])
                continue
            for source in self.flows[here]:
                if source not in seen and (self.reads[source] or not self.reads[node]):
                    seen.add(source)
                    waiting.append(source)
        products.sort(key=lambda p: self.trace.order[p.node])
        return products, calls, streams

    @cached_property
    def call_at(self) -> dict[fx.Node, Call]:
        return {call.node: call for call in self.calls}


def carriers(node: fx.Node, sources: list[fx.Node]) -> list[fx.Node]:
    """The sources whose numbers reach a node's result: not those that give a shape or a dtype, nor integers."""
    name = operator_name(node)
    if name in MAKES_NEW:
        sources = [source for source in sources if source not in node.all_input_nodes]
    elif name in LIKE_SECOND and len(node.args) > 1:
        sources = [source for source in sources if source is not node.args[1] or source is node.args[0]]
    return [s for s in sources if (kind := dtype_of(s)) is None or kind.is_floating_point or kind.is_complex]
