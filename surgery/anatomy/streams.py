"""Which rows and columns make up a channel of the residual stream: of all that read and write it, never by names.

Every projection that reads the stream is followed back, across layers, to the projections, lookups and vectors that
write what it reads. What a norm computes of all channels together is held still on the way, so that each number reaches
one channel; see `norms` for what becomes of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import Tensor, fx
from torch.utils._pytree import tree_map

from surgery.anatomy import norms
from surgery.anatomy.coupling import Coupling, Table, alike, rows
from surgery.anatomy.flow import Flow
from surgery.anatomy.groups import Axis, Group, Norm, joined
from surgery.anatomy.probe import Probe, Unknown, shape_of
from surgery.anatomy.products import Product, operator_name
from surgery.anatomy.reach import NONE, SEVERAL, Mixed, Reach
from surgery.anatomy.roles import Roles
from surgery.anatomy.stretch import REDUCTIONS
from surgery.anatomy.trace import owner

WHOLE = ("layer_norm", "rms_norm")
"""Norms that are one operator: (x, shape, gain, ...)."""


class Streams(Coupling):
    """The residual streams of one traced model: of an encoder and a decoder that share no tensor there are two."""

    def channels(self) -> list[Group]:
        """One group for each stream; `refused` says why there is none, at the place that is in the way."""
        readers = [each for each in self.flow.products if each.kind != "lookup"]
        reading = [each for each in readers if each.input in self.flow.stream]
        found = [group for each in reading for group in self.attempt(each, self.channels_of)]
        try:
            streams = [group for group in self.joined(found) if self.residual(group)]
            while more := [each for each in readers if self.tied(each, streams)]:  # as a head behind a projection
                found = [group for each in more for group in self.attempt(each, self.channels_of)]
                if not found:
                    break
                streams = self.joined([*streams, *found])
        except ValueError as error:
            self.refused.setdefault(str(error).rpartition(".")[0], "others divide what they share with it differently")
            return []
        output = next(iter(self.flow.trace.outputs), None)
        if streams and output in self.flow.stream:
            self.refused["the model's output"] = "it is the stream itself, and what uses it would find another width"
        return [self.everywhere(group) for group in streams]

    def channels_of(self, reader: Product) -> Group:
        """What one projection reads, with all that writes it."""
        width = reader.shape[-1]
        reach = Across(self.roles, reader, width)
        if reach.calls:
            raise Mixed("it reads what attention gives without a projection between")
        codes = reach.indices(reader.channel_dimension)
        if any(bool((codes[node] != NONE).any()) for node in reach.given):
            raise Mixed("it reads an input of the model, which keeps its width")
        table: Table = {}
        for product in reach.products:
            units = alike(rows(product, codes[product.node]))
            if not bool((units >= 0).any()):
                continue  # the same for all channels: a router's, or a gate's
            if product.kind == "experts":
                _put_rows(table, product, units)
            else:
                self.rows(table, product, units)
        for leaf in reach.leaves:
            self.leaf(table, leaf, codes[leaf], reader.node)
        written = {unit for axis in table.values() for unit in axis.units} - {NONE}
        if written != set(range(width)):
            raise Mixed("what it reads mixes channels without a stored matrix, as a convolution over positions does")
        columns = self.columns(reader, range(width)) if reader.kind != "experts" else _columns(reader)
        held = {axis.path for axis in table.values()}
        # Before a map from one stream to another of the same width there may be more norms, of the other one.
        found = tuple(norm for path in reach.norms if not (norm := self.norm(path, width)).gain or path in held)
        return Group("channels", width, (columns,), tuple(table.values()), norms=found)

    def joined(self, groups: Iterable[Group]) -> list[Group]:
        return joined(groups, self.tensor)

    def tensor(self, name: str) -> object:
        """What a name stands for: one of several of a tied tensor."""
        return self.flow.stores.tensors.get(name, name)

    def tied(self, reader: Product, streams: Sequence[Group]) -> bool:
        """Whether a projection that reads no stream has a tensor whose columns are a stream's channels."""
        if any(reader.path in group.places for group in streams) or reader.kind == "experts":
            return False
        mine = self.tensor(f"{reader.path}.{reader.parameter}"), 0 if reader.transposed else 1
        return any(mine == (self.tensor(axis.name), axis.axis) for group in streams for axis in group.axes)

    def residual(self, group: Group) -> bool:
        """Whether some layer reads what another one, or none, has written: not what lies within one layer."""
        place = self.flow.lists.place
        if not self.flow.lists.members:
            return True
        readers = {place(axis.path) for axis in group.readers}
        return any(place(axis.path) != reader for axis in group.writers for reader in readers if reader is not None)

    def norm(self, path: str, width: int) -> Norm:
        if path not in self.learnt:
            self.learnt[path] = norms.learn(path, self.trace.shadow.module.get_submodule(path), width)
        found = self.learnt[path]
        if found is None:
            raise Mixed(f"{path or 'the model'} computes a norm of the channels among other things")
        return found

    @cached_property
    def learnt(self) -> dict[str, Norm | None]:
        return {}

    def everywhere(self, group: Group) -> Group:
        """With the same rows, columns and norms of the layers that each studied one stands for."""
        for representative, others in sorted(self.trace.shadow.copies.items(), key=lambda item: -item[0].count(".")):
            for other in others:
                moved = group.moved(representative, other)
                readers, writers, found = (
                    tuple(dict.fromkeys((*getattr(group, name), *getattr(moved, name))))
                    for name in ("readers", "writers", "norms")
                )
                group = replace(group, readers=readers, writers=writers, norms=found)
        return self.under_all_names(group)

    def under_all_names(self, group: Group) -> Group:
        """With the names of tied tensors by which nothing reads them."""
        known = {(axis.name, axis.axis): axis for axis in group.axes}
        for axis in group.axes:
            for name in self.flow.stores.names.get(self.flow.stores.tensors.get(axis.name, 0), ()):
                path, _, parameter = name.rpartition(".")
                known.setdefault((name, axis.axis), replace(axis, path=path, parameter=parameter))
        read = {(axis.name, axis.axis) for axis in group.readers}
        return replace(group, writers=tuple(axis for key, axis in known.items() if key not in read))


class Across(Reach):
    """What lies between a projection and all that writes what it reads, the stream included.

    norms: modules that compute something of all channels together. given: the model's own inputs on the way.
    """

    def __init__(self, roles: Roles, reader: Product, width: int) -> None:
        super().__init__(roles, reader.input, reader.node, roles.flow.boundaries)
        self.probe = Straight(roles.flow, width)
        kept = sorted(self.inside & roles.flow.trace.given.keys(), key=lambda node: node.name)
        self.given = [node for node in kept if roles.flow.trace.given[node].is_floating_point()]
        together = [node for node in self.inside if self.probe.reduces(node)]
        together.sort(key=lambda node: self.trace.order[node])
        self.norms = list(dict.fromkeys(map(owner, together)))

    @cached_property
    def starts(self) -> list[fx.Node]:
        return [*super().starts, *self.given]


class Straight(Probe):
    """Takes what is computed of all channels together for a constant."""

    def __init__(self, flow: Flow, width: int) -> None:
        super().__init__(flow.trace)
        self.width = width

    def reduces(self, node: fx.Node) -> bool:
        """Whether a node computes one number, or a norm, of as many as there are channels."""
        name = operator_name(node)
        arguments: Any = node.args
        if name in WHOLE:
            return list(arguments[1]) == [self.width]
        if name not in REDUCTIONS or not node.all_input_nodes:
            return False
        try:
            before = shape_of(node.all_input_nodes[0])
            after = tuple(node.meta["val"].shape) if isinstance(node.meta.get("val"), Tensor) else None
        except Unknown:
            return False
        if after is not None:
            return math.prod(before) == math.prod(after) * self.width and self.width in before
        return bool(before) and before[-1] == self.width  # several results, as of var_mean

    def value(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        if not self.reduces(node):
            return super().value(node, values)
        if operator_name(node) not in WHOLE:
            return tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, super().value(node, values))
        arguments: Any = fx.node.map_arg(tuple(node.args), lambda n: values[n])
        x, _, *rest = arguments
        for factor in rest[:1]:
            x = x if factor is None else x * factor
        for summand in rest[1:2]:
            x = x + summand if isinstance(summand, Tensor) else x
        return x


def literals(flow: Flow) -> list[float]:
    """The numbers that stand in a model's code, in order: what they are made of does not show."""
    found: list[float] = []
    for node in flow.trace.nodes:
        if node.op == "call_function":
            fx.node.map_aggregate((node.args, node.kwargs), lambda x: found.append(x) if type(x) is float else None)
    return found


def _put_rows(table: Table, product: Product, units: Tensor) -> None:
    """Experts' output channels, by the units that each reaches."""
    if bool((units == SEVERAL).any()):
        raise Mixed(f"a row of {product.path} reaches several channels")
    axis = Axis.of(product.path, product.parameter, 2 if product.transposed else 1, units.tolist())
    if table.setdefault((axis.name, axis.axis), axis) != axis:
        raise Mixed(f"{axis.name} is used for several channels")


def _columns(reader: Product) -> Axis:
    return Axis.of(reader.path, reader.parameter, 1 if reader.transposed else 2, range(reader.shape[-1]))
