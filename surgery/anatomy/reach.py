"""What reaches what in a stretch of the graph, index by index: by gradients on random float64 numbers.

Every index of what a projection reads gets a binary code; for each bit one gradient tells which numbers in front of the
stretch reach an index that has the bit, and which reach one that has not.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor, fx

from surgery.anatomy.flow import Call
from surgery.anatomy.probe import Probe, Unknown, dtype_of
from surgery.anatomy.products import Product
from surgery.anatomy.roles import Roles
from surgery.anatomy.trace import owner

NONE, SEVERAL = -1, -2
"""Codes of a number that reaches nothing, and of one that reaches several indices."""
CHECKS = ("sym_size", "_assert_tensor_metadata", "_assert_scalar", "_assert_async")


class Mixed(Exception):
    """Units that cannot be told apart; the message says why."""


class Reach:
    """What lies between a value, as its reader finds it, and what it is computed from.

    products, calls: projections, lookups and attention calls. leaves: stored tensors that come in on the way.
    """

    def __init__(self, roles: Roles, target: fx.Node, reader: fx.Node, stops: set[fx.Node] | None = None) -> None:
        """stops: where it starts at the latest; at the stream, unless said otherwise."""
        self.roles, self.flow, self.trace = roles, roles.flow, roles.flow.trace
        self.probe: Probe = roles.probe
        self.target, self.reader = target, reader
        self.written = self.trace.writes.get((reader, target), [])
        self.stops = (self.flow.boundaries | self.flow.stream if stops is None else stops) - {target}
        self.products: list[Product] = []
        self.calls: list[Call] = []
        self.leaves: list[fx.Node] = []
        self.inside: set[fx.Node] = set()
        waiting = [target, *self.written]
        while waiting:
            node = waiting.pop()
            if node in self.inside:
                continue
            self.inside.add(node)
            if node is not target and node in self.flow.at:
                self.products.append(self.flow.at[node])
            elif node is not target and node in self.flow.call_at:
                self.calls.append(self.flow.call_at[node])
            elif node in self.trace.weights:
                kind = dtype_of(node)
                self.leaves += [node] if kind is not None and kind.is_floating_point else []
            elif node not in self.stops:
                waiting += self.trace.reads[node]
        self.products.sort(key=lambda product: self.trace.order[product.node])

    @cached_property
    def starts(self) -> list[fx.Node]:
        return [*(product.node for product in self.products), *(call.node for call in self.calls), *self.leaves]

    def only_for(self, *others: Reach) -> None:
        """Raises Mixed where something outside of these stretches reads what is computed in this one."""
        readers = {each.reader for each in (self, *others)}
        inside = {node for each in (self, *others) for node in each.inside}
        for node in self.inside:
            if not self.flow.reads[node] or (node in self.flow.stream and node not in self.flow.at):
                continue
            for user in self.trace.readers[node]:
                if user in inside or user in readers or any(check in str(user.target) for check in CHECKS):
                    continue
                if user.op == "output" or node in self.flow.flows[user]:
                    where = "the model's output" if user.op == "output" else owner(user) or "the model itself"
                    raise Mixed(f"{where} reads what it computes as well")

    def values(self, sign: float = 1.0) -> tuple[dict[fx.Node, Tensor], Tensor]:
        """Live random numbers where the stretch starts, and what it makes of them."""
        known = {node: (self.probe.random(node) * sign).requires_grad_() for node in self.starts}
        value = self.probe.run([*self.written, self.target], known, self.stops)[-1]
        if not isinstance(value, Tensor) or not value.requires_grad:
            raise Unknown(self.target.name)
        return known, value

    def indices(self, dimension: int) -> dict[fx.Node, Tensor]:
        """For each number where the stretch starts the one index along the target's dimension that it reaches."""
        found: dict[fx.Node, Tensor] = {}
        for sign in (1.0, -1.0):  # behind a relu half of the numbers reach nothing
            known, value = self.values(sign)
            for node, codes in _codes(value, dimension, known).items():
                found[node] = _agreed(found[node], codes) if node in found else codes
        return found

    def slices(self, count: int) -> dict[fx.Node, Tensor]:
        """For each number where the stretch starts, (heads, *shape): which heads of a call it reaches."""
        known, value = self.values()
        heads = by_head(value, count)
        found = [_reached(_weighed(head), known) for head in heads]
        empty = {node: torch.zeros(start.shape, dtype=torch.bool) for node, start in known.items()}
        return {node: torch.stack([reached.get(node, empty[node]) for reached in found]) for node in known}


def by_head(value: Tensor, heads: int) -> Tensor:
    """An attention's output with its heads in front. Raises Mixed where it is no (batch, head, token, width)."""
    if value.dim() == 3 and value.shape[0] % heads == 0:
        value = value.unflatten(0, (-1, heads))
    if value.dim() != 4 or value.shape[1] != heads:
        raise Mixed("its heads are not one dimension of what attention gives")
    return value.transpose(0, 1)


def _codes(value: Tensor, dimension: int, known: Mapping[fx.Node, Tensor]) -> dict[fx.Node, Tensor]:
    size = value.shape[dimension]
    index = torch.arange(size).view(-1, *[1] * (-1 - dimension if dimension < 0 else value.dim() - 1 - dimension))
    empty = {node: torch.zeros(start.shape, dtype=torch.bool) for node, start in known.items()}
    codes = {node: torch.zeros(start.shape, dtype=torch.long) for node, start in known.items()}
    hit, several = dict(empty), dict(empty)
    for bit in range(max(1, (size - 1).bit_length())):
        chosen = (index >> bit) & 1 == 1
        zero, one = (_reached(_weighed(value, mask), known) for mask in (~chosen, chosen))
        for node, nothing in empty.items():
            off, on = zero.get(node, nothing), one.get(node, nothing)
            codes[node] |= on.long() << bit
            hit[node] = hit[node] | off | on
            several[node] = several[node] | (off & on)
    return {node: codes[node].masked_fill(~hit[node], NONE).masked_fill(several[node], SEVERAL) for node in known}


def _weighed(value: Tensor, mask: Tensor | float = 1.0) -> Tensor:
    weights = torch.rand(value.shape, generator=torch.Generator().manual_seed(1), dtype=value.dtype) + 0.5
    return (value * weights * mask).sum()


def _reached(total: Tensor, known: Mapping[fx.Node, Tensor]) -> dict[fx.Node, Tensor]:
    """Which numbers have a gradient."""
    grads = torch.autograd.grad(total, list(known.values()), allow_unused=True, retain_graph=True)
    return {node: grad != 0 for node, grad in zip(known, grads, strict=True) if grad is not None}


def _agreed(one: Tensor, other: Tensor) -> Tensor:
    found = torch.where(one == NONE, other, one)
    return found.masked_fill((found != other) & (other != NONE), SEVERAL)
