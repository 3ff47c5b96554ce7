"""Roles by dataflow: attention by back-propagation from its calls, feed-forward by numbers, the rest by what it reads.

No names are consulted and there is no table of architectures.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from surgery.anatomy.flow import Call, Flow
from surgery.anatomy.parts import Heads
from surgery.anatomy.probe import Informed, Probe, Unknown, gradients, shape_of
from surgery.anatomy.products import Product, operator_name
from surgery.anatomy.stretch import Stretch, channel_mask

SCALES = {"mul", "mul_", "div", "matmul", "bmm", "einsum", "baddbmm"}


@dataclass
class Finding:
    """One role of one product: the channels that play it (a mask over the outputs of the stored matrix)."""

    role: str
    product: Product
    channels: torch.Tensor | None = None


@dataclass
class AttentionFinding:
    """One module that calls attention: its role (`attn` or `cross`), geometry, and whether later tokens are hidden."""

    role: str
    call: Call
    heads: Heads | None
    causal: bool
    sources: list[Product] = field(default_factory=list)


class Roles:
    """Applies the rules to one traced model."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.probe = Probe(flow.trace)
        self.findings: list[Finding] = []
        self.attention: list[AttentionFinding] = []
        self.find_routers()
        self.find_attention()
        self.find_outputs()
        self.find_heads()
        self.find_feed_forward()

    # -- bookkeeping

    def roles_of(self, product: Product) -> set[str]:
        return {f.role for f in self.findings if f.product.stored is product.stored and same_rows(f.product, product)}

    def add(self, role: str, product: Product, channels: torch.Tensor | None = None) -> None:
        for finding in self.findings:
            known = finding.product
            if finding.role == role and known.stored is product.stored and known.path == product.path:
                if finding.channels is not None and channels is not None and same_rows(known, product):
                    finding.channels |= channels
                    return
                if same_rows(known, product):
                    return
        self.findings.append(Finding(role, product, channels))

    def layer(self, product: Product) -> object:
        return self.flow.lists.place(product.path)

    # -- attention

    def find_attention(self) -> None:
        for call in self.flow.calls:
            query, key, value = (self.feeding(nodes, call) for nodes in self.oriented(call))
            settle(query, key)
            prefix = "cross" if self.crosses(query, key or value) else "attn"
            for letter, found in (("q", query), ("k", key), ("v", value)):
                for product, channels in found.items():
                    self.add(f"{prefix}.{letter}", product, channels)
            self.attention.append(
                AttentionFinding(prefix, call, self.heads(call), self.causal(call), [*query, *key, *value])
            )

    def oriented(self, call: Call) -> tuple[list[fx.Node], list[fx.Node], list[fx.Node]]:
        """Query, key and value operands: one entry of the weights depends on one query and on all keys."""
        if not call.scores:
            return call.query, call.key, call.value
        query, key = [], []
        for left, right in zip(call.query, call.key, strict=True):
            swapped = False
            try:
                a = self.probe.random(left).requires_grad_()
                b = self.probe.random(right).requires_grad_()
                (weights,) = self.probe.run([call.softmax], {left: a, right: b}, set(self.flow.boundaries))
                grads = gradients([weights.flatten()[-1:] * 1.0], [a, b])
                if grads[0] is not None and grads[1] is not None:
                    swapped = int((grads[0] != 0).sum()) > int((grads[1] != 0).sum())
            except Unknown:
                pass
            query.append(right if swapped else left)
            key.append(left if swapped else right)
        return query, key, call.value

    def feeding(self, nodes: list[fx.Node], call: Call) -> dict[Product, torch.Tensor]:
        """Which channels of which projections reach these operands, by gradient."""
        found: dict[Product, torch.Tensor] = {}
        for node in nodes:
            readers = [reader for reader in (call.node, *call.scores) if node in reader.all_input_nodes]
            reader = readers[0] if readers else call.node
            products, _, _ = self.flow.sources(node, reader)
            written = self.flow.trace.writes.get((reader, node), [])
            products = [p for p in products if p.kind != "lookup" and "router" not in self.roles_of(p)]
            try:
                known = {p.node: self.probe.random(p.node).requires_grad_() for p in products}
                values = self.probe.run([*written, node], known, self.flow.boundaries | (self.flow.stream - {node}))
                grads = gradients(values[-1:], list(known.values()))
            except Unknown:
                if len(products) == 1:
                    found[products[0]] = torch.ones(products[0].width, dtype=torch.bool)
                continue
            for product, gradient in zip(products, grads, strict=True):
                if gradient is not None and bool((gradient != 0).any()):
                    mask = channel_mask(product, gradient)
                    found[product] = found[product] | mask if product in found else mask
        return found

    def crosses(self, query: dict[Product, torch.Tensor], key: dict[Product, torch.Tensor]) -> bool:
        """Keys read something else than queries do."""
        reads = self.flow.reads
        asked = {reads[product.input] for product in query}
        offered = {reads[product.input] for product in key}
        return bool(asked and offered) and not asked & offered

    def heads(self, call: Call) -> Heads | None:
        """Geometry from the operands' shapes; equal heads of the keys (grouped-query attention) count once."""
        try:
            q, k, v = (shape_of(group[0]) for group in (call.query, call.key, call.value))
            batch = next(iter(self.flow.trace.given.values())).shape[0]
        except (Unknown, StopIteration):
            return None
        if len(q) == 4 and len(k) == 4 and operator_name(call.node) != "einsum":
            transposed = bool(call.scores) and operator_name(call.scores[0]) != "einsum"
            width = k[2] if transposed else k[3]
            return Heads(q[1], self.distinct(call, k[1]), width, v[3])
        if len(q) == 3 and len(k) == 3 and operator_name(call.node) in ("bmm", "matmul", "baddbmm"):
            heads = q[0] // batch if q[0] % batch == 0 else 1
            return Heads(heads, heads, q[2], v[-1])
        return None

    def distinct(self, call: Call, heads: int) -> int:
        """How many different heads the values have: repeated ones are equal on any numbers."""
        node = call.value[0]
        try:
            (value,) = self.probe.run([node], {}, self.flow.boundaries | (self.flow.stream - {node}))
        except Unknown:
            return heads
        rows = value.transpose(0, 1).reshape(value.shape[1], -1)
        return int(torch.unique(rows, dim=0).shape[0])

    def causal(self, call: Call) -> bool:
        """Whether a query sees no later key, by the mask's own numbers: also those of a buffer."""
        node = call.node
        probe = Informed(self.flow.trace)
        arguments = dict(node.kwargs)
        if not call.scores:
            positional = list(node.args)
            if (len(positional) > 5 and positional[5]) or arguments.get("is_causal"):
                return True
            mask = positional[3] if len(positional) > 3 else arguments.get("attn_mask")
            if not isinstance(mask, fx.Node):
                return False
            try:
                (seen,) = probe.run([mask], {}, self.flow.boundaries)
            except Unknown:
                return False
            allowed = seen if seen.dtype == torch.bool else seen > -1e4
            return triangular(allowed)
        try:
            (weights,) = probe.run([call.softmax], {}, self.flow.boundaries)
        except Unknown:
            return False
        return triangular(weights > 1e-30)

    # -- what reads attention's output

    def find_outputs(self) -> None:
        roles = {finding.call: finding for finding in self.attention}
        for product in self.flow.products:
            if product.kind == "lookup" or self.roles_of(product):
                continue
            _, calls, _ = self.flow.sources(product.input, product.node)
            for call in calls:
                prefix = roles[call].role
                # In a layer with both, what reads the two together is the output of self-attention.
                self.add(f"{prefix}.o", product, None)

    # -- routers

    def find_routers(self) -> None:
        for product in self.flow.products:
            if product.kind != "projection" or self.layer(product) is None or self.roles_of(product):
                continue
            seen, waiting = {product.node}, [product.node]
            while waiting:
                for user in self.flow.trace.readers[waiting.pop()]:
                    if user in seen or user in self.flow.boundaries or user in self.flow.stream:
                        continue
                    seen.add(user)
                    waiting.append(user)
            for node in seen:
                if operator_name(node) in ("topk", "argmax", "sort", "argsort") and node is not product.node:
                    source = node.all_input_nodes[0]
                    try:
                        wide, full = shape_of(source), shape_of(product.node)
                    except Unknown:
                        continue
                    if wide and wide[-1] == full[-1] and torch.Size(wide).numel() == torch.Size(full).numel():
                        self.add("router", product)
                        break

    # -- heads

    def find_heads(self) -> None:
        """A head writes the model's outputs; a model whose first output is the stream itself has none."""
        outputs = self.flow.trace.outputs
        if not outputs or not self.head_products(outputs[0]):
            return
        for output in outputs:
            for product in self.head_products(output):
                self.add("head", product)

    def head_products(self, output: fx.Node) -> list[Product]:
        products, calls, _ = self.flow.sources(output)
        if self.flow.composed(output):
            return []
        return [
            p
            for p in products
            if p.kind == "projection" and self.layer(p) is None and not self.roles_of(p) and not calls
        ]

    # -- feed-forward and mixers

    def find_feed_forward(self) -> None:
        flow = self.flow
        attention = {f.product.stored for f in self.findings}
        has_layers = bool(flow.lists.members)
        for down in flow.products:
            if down.kind == "lookup" or down.stored in attention or (has_layers and self.layer(down) is None):
                continue
            if not self.enters_stream(down):
                continue
            products, calls, _ = flow.sources(down.input, down.node)
            ups = [
                p
                for p in products
                if p.kind != "lookup" and p.stored not in attention and p.stored is not down.stored
                and self.layer(p) == self.layer(down)
            ]  # fmt: skip
            if ups and not calls:
                try:
                    self.judge(down, ups)
                except Unknown:
                    continue

    def enters_stream(self, product: Product) -> bool:
        """Whether the product's result is added to the residual stream; a gate on it only scales it."""
        seen, waiting = {product.node}, [product.node]
        while waiting:
            for user in self.flow.trace.readers[waiting.pop()]:
                if user.op == "output" or (user in self.flow.stream and operator_name(user) not in SCALES):
                    return True
                if user not in seen and user not in self.flow.stream and user not in self.flow.boundaries:
                    seen.add(user)
                    waiting.append(user)
        return False

    def judge(self, down: Product, ups: list[Product]) -> None:
        """Whether the stretch between is a feed-forward (token by token, non-linear) or mixes tokens."""
        stretch = Stretch(self.flow, self.probe, down, ups)
        if down.kind != "experts" and stretch.mixes_tokens():
            for up in ups:
                if up.input in self.flow.stream:
                    self.add("mixer.in", up)
            self.add("mixer.out", down)
            return
        if stretch.normalises():
            return
        bent = [up for up in ups if up.input in self.flow.stream and stretch.bends(up)]
        if not bent:
            return
        straight = [up for up in ups if up not in bent and up.input in self.flow.stream]
        for up in straight:
            self.add("ffn.up", up)
        for up in bent:
            if straight:
                self.add("ffn.gate", up)
                continue
            affine = stretch.affine_channels(up)
            if affine is not None and bool(affine.any()) and not bool(affine.all()):
                self.add("ffn.gate", up, ~affine)
                self.add("ffn.up", up, affine)
            else:
                self.add("ffn.up", up)
        self.add("ffn.down", down)


def settle(query: dict[Product, torch.Tensor], key: dict[Product, torch.Tensor]) -> None:
    """Where queries and keys are each made of the same two projections, the wider one is the queries' own."""
    both = [product for product in query if product in key and torch.equal(query[product], key[product])]
    if len(both) < 2:
        return
    widest = max(both, key=lambda product: int(query[product].sum()))
    for product in both:
        del (key if product is widest else query)[product]


def same_rows(one: Product, other: Product) -> bool:
    return one.rows == other.rows


def triangular(allowed: torch.Tensor) -> bool:
    """Each query sees what the one before it sees and more, the first one not everything that the last one does.

    Columns that everybody sees (sinks, a prefix) make no difference; a sliding window is told by its upper corner.
    """
    if allowed.dim() < 2 or min(allowed.shape[-2:]) < 2:
        return False
    flat = allowed.reshape(-1, *allowed.shape[-2:])
    grows = not bool((flat[:, :-1] & ~flat[:, 1:]).any()) and bool((flat[:, -1] & ~flat[:, 0]).any())
    above = torch.triu(torch.ones(allowed.shape[-2:], dtype=torch.bool), 1)
    return grows or (not bool((flat & above).any()) and bool(flat.any()))
