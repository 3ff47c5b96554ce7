"""Every product of an activation with a stored matrix, and every lookup: the places that hold a model's weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from surgery.anatomy.parts import Kind
from surgery.anatomy.probe import Unknown, dtype_of, shape_of
from surgery.anatomy.trace import Trace, owner

# Operators that hand a stored tensor on, rearranged or cast, without mixing it with anything else.
REARRANGES = {
    "t", "transpose", "permute", "view", "reshape", "unsqueeze", "squeeze", "expand", "to", "_to_copy", "alias",
    "contiguous", "clone", "detach", "slice", "split", "split_with_sizes", "chunk", "getitem", "select", "numpy_T",
    "_unsafe_view", "flatten", "unflatten", "movedim", "narrow", "lift_fresh_copy", "type_as", "mT", "unbind",
    "view_as", "detach_", "dropout", "repeat", "expand_as",
}  # fmt: skip
SCALES = {"mul", "mul_", "div", "div_"}
CUTS_UP = {"slice", "split", "split_with_sizes", "chunk", "select", "narrow", "unbind"}


def operator_name(node: fx.Node) -> str:
    """`linear` for `aten.linear.default`; "" for what is not a call."""
    if node.op != "call_function":
        return ""
    target: Any = node.target
    packet = getattr(target, "overloadpacket", None)
    return str(packet).rpartition(".")[2] if packet is not None else getattr(target, "__name__", str(target))


@dataclass(eq=False)
class Product:
    """One use of one stored matrix.

    node: gives the product (or the looked-up rows). input: the activation, or the indices of a lookup.
    stored: the placeholder of the weight. rows: for a product with some rows of the stored matrix only, which ones.
    channel_dimension: of the node's value, counted from the end.
    """

    node: fx.Node
    kind: Kind
    input: fx.Node
    stored: fx.Node
    path: str
    parameter: str
    shape: tuple[int, ...]
    transposed: bool = False
    bias: str | None = None
    rows: tuple[int, int] | None = None
    channel_dimension: int = -1

    @property
    def width(self) -> int:
        """Output channels of this use."""
        return self.rows[1] - self.rows[0] if self.rows else self.shape[-2 if self.kind == "experts" else 0]


def stored(trace: Trace, node: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    """The parameter behind a node and the chain of rearrangements between them; None when there is none."""
    chain: list[fx.Node] = []
    while node not in trace.weights:
        scaled = operator_name(node) in SCALES and len(node.all_input_nodes) == 1
        if (operator_name(node) not in REARRANGES and not scaled) or not node.all_input_nodes:
            return None
        chain.append(node)
        node = node.all_input_nodes[0]
    return (node, chain) if node in trace.parameters or len(shape_of(node)) >= 2 else None


class Products:
    """Finds products in a trace; knows all names of tied tensors."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.names: dict[int, list[str]] = {}
        self.tensors: dict[str, int] = {}
        module = trace.shadow.module
        for table in (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)):
            for name, tensor in table:
                self.names.setdefault(id(tensor), []).append(name)
                self.tensors[name] = id(tensor)

    def name(self, placeholder: fx.Node, user: fx.Node) -> str:
        """The name of a stored tensor at this use: of several names that of the module whose forward uses it."""
        target = self.trace.weights[placeholder]
        names = self.names.get(self.tensors.get(target, 0), [target])
        where = owner(user).split(".")

        def closeness(name: str) -> int:
            shared = 0
            for a, b in zip(name.split("."), where, strict=False):
                if a != b:
                    break
                shared += 1
            return shared

        return max(names, key=closeness)

    def find(self) -> list[Product]:
        found = []
        for node in self.trace.nodes:
            try:
                product = self.product(node)
            except Unknown:
                product = None
            if product is not None:
                found.append(product)
        return found

    def product(self, node: fx.Node) -> Product | None:
        kind = operator_name(node)
        args: Any = node.args
        if kind == "linear":
            return self.matrix(node, args[0], args[1], out_first=True, bias=args[2] if len(args) > 2 else None)
        if kind == "addmm":
            return self.matrix(node, args[1], args[2], out_first=False, bias=args[0])
        if kind in ("mm", "matmul", "bmm") or "grouped_mm" in kind:
            return self.matrix(node, args[0], args[1], out_first=False) or self.turned(node, args[0], args[1])
        if kind == "baddbmm":
            return self.matrix(node, args[1], args[2], out_first=False)
        if kind == "einsum":
            return self.einsum(node)
        if kind in ("conv1d", "convolution"):
            return self.pointwise(node)
        if kind == "embedding":
            return self.lookup(node, args[0], args[1])
        if kind in ("index", "index_select") and isinstance(args[0], fx.Node):
            indices = args[1] if kind == "index" else [args[2]]
            if isinstance(indices, (list, tuple)) and len(indices) == 1 and isinstance(indices[0], fx.Node):
                return self.lookup(node, args[0], indices[0])
        return None

    def matrix(self, node: fx.Node, x: Any, weight: Any, out_first: bool, bias: Any = None) -> Product | None:
        """`out_first`: the operand is (out, in) as `linear` takes it, else (in, out)."""
        source = stored(self.trace, weight)
        if source is None or not isinstance(x, fx.Node):
            return None
        placeholder, chain = source
        full, used = shape_of(placeholder), shape_of(weight)
        if len(used) == 3:
            return self.experts(node, x, placeholder, used, flips(chain))
        if len(used) != 2:
            return None
        out, wide = used if out_first else (used[1], used[0])
        if len(full) == 3 and "select" in map(operator_name, chain):
            return self.build(
                node, "experts", x, placeholder, (full[0], out, wide), flips(chain) == out_first, bias, None
            )
        size = math.prod(full)
        rows = None
        if size != out * wide:
            placed = self.rows(placeholder, chain, out_first)
            if placed is None:
                return None
            rows, out = placed, full[0]
        transposed = len(full) >= 2 and (full[0] != out if full[0] != full[-1] else flips(chain) == out_first)
        return self.build(node, "projection", x, placeholder, (out, wide), transposed, bias, rows)

    def rows(self, placeholder: fx.Node, chain: list[fx.Node], out_first: bool) -> tuple[int, int] | None:
        """Which rows of a stored matrix a product uses, where it uses a contiguous part of them."""
        if not any(operator_name(node) in CUTS_UP for node in chain):
            return None
        full = shape_of(placeholder)
        values: dict[fx.Node, Any] = {placeholder: torch.arange(full[0]).view(-1, *[1] * (len(full) - 1)).expand(full)}
        from surgery.anatomy.probe import call

        for node in reversed(chain):
            values[node] = call(node, values)
        used = values[chain[0]]
        line = (used if out_first else used.t())[:, 0]
        start, stop = int(line[0]), int(line[-1]) + 1
        return (start, stop) if stop - start == len(line) else None

    def turned(self, node: fx.Node, weight: Any, x: Any) -> Product | None:
        """`weight @ x`, with the activations' channels in the second dimension from the end."""
        source = stored(self.trace, weight) if isinstance(weight, fx.Node) else None
        if source is None or len(shape_of(weight)) != 2 or len(shape_of(source[0])) != 2 or len(shape_of(x)) < 3:
            return None
        product = self.build(node, "projection", x, source[0], shape_of(weight), flips(source[1]), None, None)
        product.channel_dimension = -2
        return product

    def experts(self, node: fx.Node, x: fx.Node, held: fx.Node, used: tuple[int, ...], flipped: bool) -> Product | None:
        full = shape_of(held)
        if len(full) != 3:
            return None
        return self.build(node, "experts", x, held, (full[0], used[2], used[1]), not flipped, None, None)

    def einsum(self, node: fx.Node) -> Product | None:
        operands: Any = node.args[1]
        if len(operands) != 2:
            return None
        sources = [stored(self.trace, operand) for operand in operands]
        if (sources[0] is None) == (sources[1] is None):
            return None
        held = 0 if sources[0] is not None else 1
        placeholder = sources[held][0]  # type: ignore[index]
        left, _, result = str(node.args[0]).replace(" ", "").partition("->")
        letters = left.split(",")
        mine, other = letters[held], letters[1 - held]
        contracted = [letter for letter in mine if letter in other and letter not in result]
        kept = [letter for letter in mine if letter in result and letter not in other]
        sizes = dict(zip(mine, shape_of(operands[held]), strict=True))
        if not contracted or not kept or len(contracted) + len(kept) != len(mine) or not result.endswith("".join(kept)):
            return None
        out, wide = (math.prod(sizes[letter] for letter in group) for group in (kept, contracted))
        return self.build(
            node, "projection", operands[1 - held], placeholder, (out, wide), mine[0] in contracted, None, None
        )

    def pointwise(self, node: fx.Node) -> Product | None:
        """A convolution over single positions is a projection; one in groups has its inputs per group as `in`."""
        source = stored(self.trace, node.args[1])  # type: ignore[arg-type]
        if source is None:
            return None
        full = shape_of(source[0])
        if len(full) != 3 or full[2] != 1:
            return None
        bias = node.args[2] if len(node.args) > 2 else None
        product = self.build(node, "projection", node.args[0], source[0], full[:2], False, bias, None)
        product.channel_dimension = -2
        return product

    def lookup(self, node: fx.Node, weight: Any, indices: fx.Node) -> Product | None:
        source = stored(self.trace, weight)
        dtype = dtype_of(indices)
        if source is None or source[0] not in self.trace.parameters or dtype is None or dtype.is_floating_point:
            return None
        full = shape_of(source[0])
        if len(full) != 2 or shape_of(weight) != full:
            return None
        return self.build(node, "lookup", indices, source[0], full, False, None, None)

    def build(
        self,
        node: fx.Node,
        kind: Kind,
        x: Any,
        placeholder: fx.Node,
        shape: tuple[int, ...],
        transposed: bool,
        bias: Any,
        rows: tuple[int, int] | None,
    ) -> Product:
        path, _, parameter = self.name(placeholder, node).rpartition(".")
        held = stored(self.trace, bias) if isinstance(bias, fx.Node) else None
        bias_name = self.name(held[0], node).rpartition(".") if held else None
        return Product(
            node=node,
            kind=kind,
            input=x,
            stored=placeholder,
            path=path,
            parameter=parameter,
            shape=shape,
            transposed=transposed,
            bias=bias_name[2] if bias_name and bias_name[0] == path else None,
            rows=rows,
        )


def flips(chain: list[fx.Node]) -> bool:
    """An odd number of transpositions between the stored matrix and its use."""
    return sum(operator_name(node) in ("t", "transpose", "numpy_T", "mT", "permute") for node in chain) % 2 == 1
