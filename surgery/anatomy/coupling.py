"""Which rows and columns of a model's tensors make up a neuron or a head: by what reaches what, never by names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, fx

from surgery.anatomy.flow import Call
from surgery.anatomy.groups import Axis, Group, Kind, joined
from surgery.anatomy.paths import moved, within
from surgery.anatomy.probe import Unknown, shape_of
from surgery.anatomy.products import Product
from surgery.anatomy.products import stored as stored_behind
from surgery.anatomy.reach import NONE, SEVERAL, Mixed, Reach, by_head
from surgery.anatomy.roles import Roles
from surgery.anatomy.stretch import rows_of
from surgery.errors import ModelError

Table = dict[tuple[str, int], Axis]


class Coupling:
    """The groups of one traced model."""

    def __init__(self, roles: Roles) -> None:
        self.roles, self.flow, self.trace = roles, roles.flow, roles.flow.trace
        self.refused: dict[str, str] = {}

    def find(self, kind: Kind) -> list[Group]:
        """The groups of every layer; `refused` has the reasons of those that there cannot be, by path of their reader.

        Errors: ModelError S208 where layers share a tensor and divide it differently.
        """
        found = list(self.neurons() if kind == "neurons" else self.heads())
        for representative, others in sorted(self.trace.shadow.copies.items(), key=lambda item: -item[0].count(".")):
            inside = [each for each in found if within(each.places[0], representative)]
            found += [each.moved(representative, other) for other in others for each in inside]
            for path in [path for path in self.refused if within(path, representative)]:
                self.refused |= {moved(path, representative, other): self.refused[path] for other in others}
        try:
            return joined(found)
        except ValueError as error:
            raise ModelError.of("S208", f"{error} is shared by layers that divide it differently") from None

    def attempt(self, reader: Product, make: Callable[[Product], Group]) -> Iterator[Group]:
        try:
            yield make(reader)
        except Mixed as reason:
            self.refused[reader.path] = str(reason)
        except Unknown:
            self.refused[reader.path] = "what it reads cannot be computed apart from the rest"

    # -- neurons

    def neurons(self) -> Iterator[Group]:
        """One group for each feed-forward network."""
        for finding in self.roles.findings:
            if finding.role == "ffn.down":
                yield from self.attempt(finding.product, self.neurons_of)

    def neurons_of(self, down: Product) -> Group:
        if down.kind != "projection":
            raise Mixed("its matrices are stacks of experts")
        reach = Reach(self.roles, down.input, down.node)
        if reach.calls:
            raise Mixed("attention lies between its maps")
        reach.only_for()
        writers = self.writers(reach, reach.indices(down.channel_dimension), down)
        count = down.shape[1]
        if {unit for axis in writers.values() for unit in axis.units} - {NONE} != set(range(count)):
            raise Mixed("some of its inputs are computed by no row")
        return Group("neurons", count, (self.columns(down, range(count)),), tuple(writers.values()))

    def writers(self, reach: Reach, codes: dict[fx.Node, Tensor], reader: Product) -> Table:
        """What is divided by unit in front of a projection, by the index that each number reaches."""
        table: Table = {}
        for product in reach.products:
            self.rows(table, product, alike(rows(product, codes[product.node])))
        for leaf in reach.leaves:
            self.leaf(table, leaf, codes[leaf], reader.node)
        return table

    # -- heads

    def heads(self) -> Iterator[Group]:
        """One group for each attention call."""
        for found in self.roles.attention:
            readers = [
                product
                for product in self.flow.products
                if product.kind == "projection" and found.call in self.flow.sources(product.input, product.node)[1]
            ]
            for reader in readers:
                if found.heads is None or len(readers) > 1:
                    self.refused[reader.path] = "its attention's heads cannot be told apart"
                    continue
                call, heads = found.call, found.heads.query
                yield from self.attempt(reader, lambda o, call=call, heads=heads: self.heads_of(call, heads, o))  # type: ignore[misc]

    def heads_of(self, call: Call, heads: int, reader: Product) -> Group:
        ahead = Reach(self.roles, reader.input, reader.node)
        behind = Reach(self.roles, call.node, next(n for n in self.trace.readers[call.node] if n in ahead.inside))
        if [each.node for each in ahead.calls] != [call.node]:
            raise Mixed("its output map reads several attentions together")
        ahead.only_for(behind)
        behind.only_for(ahead)
        # Behind the call: which heads a number reaches. Ahead of it: which column, and so which head.
        indices = ahead.indices(reader.channel_dimension)
        columns = _heads_of_columns(by_head(indices[call.node], heads), reader.shape[1])
        lookup = torch.tensor([*columns, SEVERAL, NONE])  # the codes -2 and -1 count from the end
        writers = self.writers(ahead, {node: lookup[codes] for node, codes in indices.items()}, reader)
        reached = behind.slices(heads)
        by_row = {product: _any(product, reached[product.node]) for product in behind.products}
        of = _sharing(list(by_row.values()), heads)
        shared: Table = {}
        for product, touched in by_row.items():
            self.divided(writers, shared, touched, of, lambda table, codes, p=product: self.rows(table, p, codes))  # type: ignore[misc]
        for leaf in behind.leaves:
            self.divided(
                writers,
                shared,
                reached[leaf],
                of,
                lambda table, codes, n=leaf: self.leaf(table, n, codes, call.node),  # type: ignore[misc]
            )
        if len(set(of)) == heads:
            of = ()
        return Group(
            "heads", heads, (self.columns(reader, columns),), tuple(writers.values()), tuple(shared.values()), of
        )

    def divided(
        self, writers: Table, shared: Table, touched: Tensor, of: Sequence[int], put: Callable[[Table, Tensor], None]
    ) -> None:
        """Put what reaches one head into `writers`, and what reaches all of a key-value group into `shared`.

        touched: (heads, *shape). What reaches all heads belongs to none.
        """
        members = torch.nn.functional.one_hot(torch.tensor(of)).bool().t()  # (groups, heads)
        flat = touched.reshape(len(touched), -1)
        whole = (flat.t()[:, None, :] == members[None]).all(-1)  # (numbers, groups)
        alone = flat.sum(0) == 1
        other = torch.where(flat.any(0), SEVERAL, NONE)
        single = torch.where(alone, flat.int().argmax(0), other.masked_fill(whole.any(1), NONE))
        group = torch.where(whole.any(1), whole.int().argmax(1), other.masked_fill(alone, NONE))
        shape = touched.shape[1:]
        put(writers, single.view(shape))
        if 1 < len(members) < len(of):
            put(shared, group.view(shape))

    # -- axes

    def rows(self, table: Table, product: Product, codes: Tensor) -> None:
        """Put a product's output channels, and its bias, into a table. codes: of each channel of this use.

        Raises Mixed where a channel belongs to several units.
        """
        units = codes.tolist()
        if SEVERAL in units:
            raise Mixed(f"a row of {product.path} reaches several of its units")
        if set(units) == {NONE}:
            return
        full = shape_of(product.stored)
        if product.kind == "experts" or len(full) - full[2:].count(1) != 2:
            raise Mixed(f"{product.path}.{product.parameter} has more dimensions than two")
        axis = 1 if product.kind == "lookup" or product.transposed else 0
        if product.rows is not None:
            units = [NONE] * product.rows[0] + units
            units += [NONE] * (full[0] - len(units))
        _put(table, Axis.of(product.path, product.parameter, axis, units))
        for name in self.biases(product):
            path, _, parameter = name.rpartition(".")
            _put(table, Axis.of(path, parameter, 0, units))

    def biases(self, product: Product) -> list[str]:
        """Vectors that a product adds by itself."""
        found = [stored_behind(self.trace, node) for node in product.node.all_input_nodes if node is not product.input]
        return [
            self.flow.stores.name(held[0], product.node)
            for held in found
            if held is not None and held[0] is not product.stored and len(shape_of(held[0])) == 1
        ]

    def leaf(self, table: Table, leaf: fx.Node, codes: Tensor, reader: fx.Node) -> None:
        """Put a stored tensor that comes in on the way into a table, by the one axis that tells units apart."""
        if not bool((codes >= 0).any()):
            return
        name = self.flow.stores.name(leaf, reader)
        for axis in range(codes.dim()):
            lines = codes.movedim(axis, 0).reshape(codes.shape[axis], -1)
            units = alike(lines.t())
            if not bool((units == SEVERAL).any()):
                path, _, parameter = name.rpartition(".")
                _put(table, Axis.of(path, parameter, axis, units.tolist()))
                return
        raise Mixed(f"no one axis of {name} tells its units apart")

    def columns(self, reader: Product, units: Sequence[int]) -> Axis:
        """The axis by which a projection reads."""
        full = shape_of(reader.stored)
        if len(full) - full[2:].count(1) != 2 or reader.rows is not None:
            raise Mixed(f"{reader.path}.{reader.parameter} is more than one matrix")
        return Axis.of(reader.path, reader.parameter, 0 if reader.transposed else 1, units)


def _put(table: Table, axis: Axis) -> None:
    """Add an axis; of a tensor that is used several times, what each use says of the others' indices is nothing."""
    before = table.get((axis.name, axis.axis))
    if before is None:
        table[axis.name, axis.axis] = axis
        return
    both = list(zip(before.units, axis.units, strict=True))
    if any(NONE not in pair and len(set(pair)) > 1 for pair in both):
        raise Mixed(f"{axis.name} is used by several of its units")
    table[axis.name, axis.axis] = Axis.of(axis.path, axis.parameter, axis.axis, list(map(max, both)))


def alike(codes: Tensor) -> Tensor:
    """(rows, channels) to the code of each channel: what its numbers say, SEVERAL where they differ."""
    top = codes.max(0).values
    same = ((codes == top) | (codes == NONE)).all(0)
    several = (codes == SEVERAL).any(0)
    return top.masked_fill(~same | several, SEVERAL)


def _any(product: Product, touched: Tensor) -> Tensor:
    """(heads, *shape of the product) to (heads, channels)."""
    return torch.stack([rows(product, head).any(0) for head in touched])


def rows(product: Product, value: Tensor) -> Tensor:
    """(tokens, channels) of a tensor shaped like what a product gives."""
    return value.flatten(0, -2) if product.kind == "lookup" else rows_of(product, value)


def _heads_of_columns(indices: Tensor, columns: int) -> list[int]:
    """The head of each column that a projection reads. indices: (heads, ...), which column each number reaches."""
    found = [NONE] * columns
    for head, codes in enumerate(indices):
        for column in codes.unique().tolist():
            if column < 0 or found[column] not in (NONE, head):
                raise Mixed("its output map reads the heads mixed")
            found[column] = head
    if NONE in found:
        raise Mixed("its output map reads more than its heads")
    return found


def _sharing(touched: Sequence[Tensor], heads: int) -> tuple[int, ...]:
    """The key-value group of each head, by which sets of heads a row reaches."""
    sets = {tuple(row.nonzero().flatten().tolist()) for each in touched for row in each.t()}
    several = sorted(each for each in sets if 1 < len(each) < heads)
    if not several:
        alone = not any(len(each) == heads for each in sets) or heads == 1
        return tuple(range(heads)) if alone else (0,) * heads
    of = {head: group for group, members in enumerate(several) for head in members}
    if sum(map(len, several)) != heads or len(of) != heads or len({len(each) for each in several}) > 1:
        raise Mixed("its heads share keys and values in no equal groups")
    return tuple(of[head] for head in range(heads))
