"""Sites: one projection or lookup being rewritten, and the handful of edits that methods make on it.

A draft is the place, which several statements rewrite in turn. A `Site` is the draft as one statement sees one part of
it: only the channels of that part, and names for its tensors that say whose they are.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from surgery.anatomy.parts import Part
from surgery.graph.draft import AnyDraft, Draft
from surgery.graph.functions import add_branch, add_to_channels, rescale, rescale_channels, unpack_bits

Init = Callable[[Tensor, torch.Generator], Any]


def zeros(tensor: Tensor, generator: torch.Generator) -> None:
    """All entries zero."""
    tensor.zero_()


def seed_of(*words: object) -> int:
    """A seed that depends on what a tensor is, not on when it is made."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, words)).encode()).digest()[:7], "big")


def tensor_name(name: str, part: Part, owner: str | None) -> str:
    """The name that a tensor of a statement has in its module: whose it is, what, and of which channels."""
    channels = "_" + re.sub(r"\W+", "_", part.name) if part.channels else ""
    return owned(f"{name}{channels}", owner)


def owned(name: str, owner: str | None) -> str:
    """What a statement's own is called: with the name of `as NAME` in front, where it has one."""
    return f"{owner}_{name}" if owner else name


class Site:
    """One part of a draft, as one statement sees it.

    kept: tensors and children that the statement put there before, by full name; they are taken instead of new ones.
    """

    draft: Draft
    kept: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self, draft: AnyDraft[Any], part: Part, statement: str, name: str | None, verb: str, seed: int = 0
    ) -> None:
        self.draft = draft  # type: ignore[assignment]  # of the kind that the class says
        self.part, self.statement, self.verb, self.seed = part, statement, verb, seed
        self.name, self._given = name or "default", name

    @property
    def path(self) -> str:
        return self.draft.path

    def full_name(self, name: str) -> str:
        """The name that a tensor of this statement has in the module: whose it is, what, and of which channels."""
        return tensor_name(name, self.part, self._given)

    @property
    def is_lookup(self) -> bool:
        """Whether the site takes token ids to rows of a table instead of features to features."""
        return self.draft.captured.product.target is F.embedding

    @property
    def in_features(self) -> int:
        """Width of the input; of a lookup, the size of its vocabulary."""
        return self.part.shape[0] if self.is_lookup else self.part.shape[1]

    @property
    def out_features(self) -> int:
        """Width of the output, of this part's channels."""
        return self.part.shape[1] if self.is_lookup else self.part.width

    @property
    def input(self) -> fx.Node:
        """x: what the product reads."""
        x: Any = self.draft.captured.product.args[0]
        return x  # type: ignore[no-any-return]

    @property
    def padding(self) -> int | None:
        """The row of a lookup's table that is never trained."""
        padding: Any = self.draft.captured.product.args[2]
        return padding  # type: ignore[no-any-return]

    @property
    def output(self) -> fx.Node:
        """The product with the branches that it has so far."""
        return self.draft.captured.output

    @property
    def weight(self) -> fx.Node:
        """The (out, in) weight as the product reads it, masked or dequantized."""
        return self.draft.captured.weight

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Of the weight as it lies in the base."""
        rows, columns = self.draft.facts.shape
        return (columns, rows) if self.draft.facts.transposed else (rows, columns)

    @property
    def weight_is_stored(self) -> bool:
        """Whether the product reads the weight as it is stored, at most transposed."""
        weight = self.weight
        return weight is self.stored or (weight.target is torch.t and weight.args[0] is self.stored)

    @property
    def stored(self) -> fx.Node:
        """The weight as it is stored, perhaps masked, before it is transposed."""
        return self.draft.captured.stored

    @property
    def base(self) -> fx.Node:
        """The product itself, bias included, without any branch."""
        return self.draft.captured.product

    @property
    def dtype(self) -> torch.dtype:
        """Of what the base computes with."""
        state = self.weight.meta.get("dtype")
        return state if state is not None else self.draft.tensor(self.part.parameter).dtype

    @property
    def device(self) -> torch.device:
        """Where new tensors are made."""
        return torch.device("meta") if self.draft.hollow else self.draft.device

    def evaluate(self, node: fx.Node) -> Tensor:
        """The value of a node that does not depend on the input, such as the weight."""
        return self.draft.evaluate(node).detach()

    def data(self, name: str) -> Tensor:
        """A tensor that this statement added, by the name it was added under."""
        return self.draft.tensor(self.full_name(name))

    def generator(self, name: str) -> torch.Generator:
        """Random numbers that belong to one tensor of this statement, whatever else the program says."""
        return torch.Generator().manual_seed(seed_of(self.seed, self.path, self.verb, self.full_name(name)))

    def rows_of(self, value: Tensor) -> Tensor:
        """The part's rows of a (out, in) tensor."""
        return value if self.part.channels is None else value[self._runs()]

    def set_rows(self, stored: Tensor, rows: Tensor) -> None:
        """Write the part's rows of a tensor that lies as the weight is stored."""
        wide = stored.t() if self.draft.facts.transposed else stored
        wide[self._runs() if self.part.channels is not None else slice(None)] = rows

    def _runs(self) -> Tensor:
        return torch.cat([torch.arange(start, stop) for start, stop in self.part.channels or ()])

    # Edits

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A new node, in front of the output."""
        (end,) = (node for node in self.draft.graph.nodes if node.op == "output")
        with self.draft.graph.inserting_before(end):
            node = self.draft.graph.call_function(function, args, kwargs)
        return self._ours(node)

    def parameter(
        self, name: str, shape: tuple[int, ...], init: Init = zeros, dtype: torch.dtype | None = None
    ) -> fx.Node:
        """A new trainable tensor; float32 over a 16-bit base, the base's dtype otherwise."""
        if self.full_name(name) in self.kept:
            return self._attribute(name, self.kept[self.full_name(name)])
        wide = torch.float32 if self.dtype.itemsize < 4 else self.dtype
        tensor = torch.empty(shape, dtype=dtype or wide, device=self.device)
        self._fill(tensor, name, init)
        return self._attribute(name, nn.Parameter(tensor))

    def buffer(self, name: str, tensor: Tensor, persistent: bool = True, exact: bool = False) -> fx.Node:
        """A new tensor that is not trained, moved to the site's device. exact: a cast of the model leaves it alone."""
        full = self.full_name(name)
        if exact:
            self.draft.exact.append(full)
        self.draft.root.register_buffer(full, self.kept.get(full, tensor).to(self.device), persistent)
        self.draft.added.append(full)
        return self._get(full)

    def module(self, name: str, module: nn.Module) -> Callable[..., fx.Node]:
        """A new child, such as dropout, whose mode follows the model's; gives the function that calls it."""
        full = self.full_name(name)
        self.draft.root.add_module(full, self.kept.get(full, module))
        self.draft.added.append(full)

        def called(*args: Any) -> fx.Node:
            (end,) = (node for node in self.draft.graph.nodes if node.op == "output")
            with self.draft.graph.inserting_before(end):
                return self._ours(self.draft.graph.call_module(full, args))

        return called

    def channels(self) -> fx.Node | None:
        """Indices of this part's output channels, None when they are all."""
        if self.part.channels is None:
            return None
        name = f"{self.part.name}_channels"
        if name in self.draft.root._buffers:
            return self._get(name)
        # Not through self.device: an index is needed as it is, also where tensors are hollow.
        self.draft.root.register_buffer(name, self._runs().to(self.draft.device), persistent=False)
        return self._get(name)

    def base_without_bias(self) -> fx.Node:
        """The part's channels of weight x, without bias or branches."""
        product, bias = self.base, self.base.args[2] if len(self.base.args) > 2 else None
        return self.own_rows(product if bias is None else self.call(torch.sub, product, bias), -1)

    def own_rows(self, node: fx.Node, dim: int = 0) -> fx.Node:
        """The part's channels of a value that has all of them along `dim`."""
        index = self.channels()
        return node if index is None else self.call(torch.index_select, node, dim, index)

    def add_to_output(self, branch: fx.Node) -> None:
        """output + branch on the part's channels; others keep their bits. Switched off, the output is as before."""
        index = self.channels()
        if index is None:
            joint = self.call(add_branch, self.output, branch)
        else:
            joint = self.call(add_to_channels, self.output, branch, index)
        joint.meta["joint"] = self.name
        self._give(joint)

    def scale_output(self, factors: fx.Node) -> None:
        """output * factors (out_features,) on the part's channels. Switched off, the output is as before."""
        index = self.channels()
        if index is None:
            joint = self.call(rescale, self.output, factors)
        else:
            joint = self.call(rescale_channels, self.output, factors, index)
        joint.meta["joint"] = self.name
        self._give(joint)

    def scale_input(self, factors: fx.Node) -> None:
        """Let the product, and what is attached later, read x * factors (in_features,); switched off, x."""
        x, product = self.input, self.base
        with self.draft.graph.inserting_before(product):
            joint = self._ours(self.draft.graph.call_function(rescale, (x, factors)))
        joint.meta["joint"] = self.name
        product.args = (joint, *product.args[1:])

    def mask_weight(self, function: Callable[..., Any], *more: Any) -> None:
        """Let the product read function(stored weight, *more) where it read the weight as it is stored."""
        captured = self.draft.captured
        old = captured.stored
        new = self.call(function, old, *more)
        if old is captured.weight:
            captured.weight = new
        captured.stored = new
        self._rewire(old, new)

    def replace_weight(self, new: fx.Node, dtype: torch.dtype) -> None:
        """Let the product read another node as its (out, in) weight. dtype: what the base computes with now."""
        captured = self.draft.captured
        old = captured.weight
        new.meta["dtype"] = dtype
        captured.weight = captured.stored = new
        self._rewire(old, new)

    def replace_product(self, function: Callable[..., Any], *more: Any) -> None:
        """Let another function with the same first operands take the product."""
        product = self.base
        product.target = function
        product.args = (*product.args, *more)
        product.meta["statement"] = self.statement

    @property
    def full_weight(self) -> fx.Node:
        """The (out, in) weight at full width; where a statement has made codes of it, what they were made of."""
        return self.weight if self.draft.wide is None else self.draft.wide

    @property
    def quantized(self) -> bool:
        """Whether the product reads codes, made of a weight that is still at hand."""
        return self.draft.encode is not None

    @property
    def can_hold(self) -> bool:
        """Whether another weight of the same shape can be put in place of the base's, see `hold_rows`."""
        return self.quantized or (self.weight_is_stored and self.part.parameter in self.draft.root._parameters)

    def hold_rows(self, rows: Tensor) -> None:
        """Change the base: let its weight, or what its codes are made of, have these rows (out of this part, in)."""
        if self.draft.encode is not None:
            self._encode_rows(rows, self.draft.encode)
            return
        stored = self.draft.tensor(self.part.parameter)
        changed = stored.detach().clone()
        self.set_rows(changed, rows.to(stored.dtype))  # rounded once
        self.draft.root.register_parameter(self.part.parameter, nn.Parameter(changed, requires_grad=False))

    def _encode_rows(self, rows: Tensor, encode: Callable[[Tensor], None]) -> None:
        if self.part.channels is None:
            encode(rows)
            return
        # Blocks of codes may run across rows: all are made again, of what other parts have put into theirs too.
        held = self.draft.held if self.draft.held is not None else self.evaluate(self.full_weight).to(rows.dtype)
        self.draft.held = held.index_copy(0, self._runs().to(held.device), rows)
        encode(self.draft.held)

    def zero_out(self, bits: Tensor) -> None:
        """Zero the stored weight where the mask's bits are not set, once every statement has succeeded."""

        def zero() -> None:
            weight = self.draft.root._parameters.get(self.part.parameter)
            if weight is not None:  # else it has become codes, which were taken from the masked weight
                weight.data.mul_(unpack_bits(bits, weight.shape))

        self.draft.at_the_end(zero)

    def put_codes(self, name: str, tensor: Tensor) -> fx.Node:
        """Hold a frozen tensor in place of the weight, under a name that stays whatever the statement's."""
        weight = self.draft.root._parameters.pop(self.part.parameter, None)
        if weight is not None:
            self.draft.replaced[self.part.parameter] = weight
        codes = self.kept[name] if name in self.kept else nn.Parameter(tensor, requires_grad=False)
        self.draft.root.register_parameter(name, codes)
        with self.draft.graph.inserting_before(next(iter(self.draft.graph.nodes))):
            return self._ours(self._unchecked(name))

    def _give(self, node: fx.Node) -> None:
        old, self.draft.captured.output = self.output, node
        self._rewire(old, node)

    def _ours(self, node: fx.Node) -> fx.Node:
        node.meta["statement"] = self.statement
        return node

    def _get(self, full: str) -> fx.Node:
        nodes: list[fx.Node] = list(self.draft.graph.nodes)
        for node in nodes:
            if node.op == "get_attr" and node.target == full:
                return node
        first = nodes[0]
        with self.draft.graph.inserting_before(first):
            return self._ours(self._unchecked(full))

    def _unchecked(self, full: str) -> fx.Node:
        # The graph belongs to no module yet, so fx cannot look the attribute up.
        return self.draft.graph.create_node("get_attr", full, (), {})

    def _attribute(self, name: str, parameter: nn.Parameter) -> fx.Node:
        full = self.full_name(name)
        self.draft.root.register_parameter(full, parameter)
        self.draft.added.append(full)
        return self._get(full)

    def _fill(self, tensor: Tensor, name: str, init: Init) -> None:
        if self.draft.hollow or tensor.is_meta:
            return
        # Drawn on the CPU so that a seed means the same numbers on every device.
        drawn = torch.empty(tensor.shape, dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32)
        with torch.no_grad():
            init(drawn, self.generator(name))
            tensor.copy_(drawn)

    def _rewire(self, old: fx.Node, new: fx.Node) -> None:
        """Give `new` to every reader of `old` but its own ancestors, and move it in front of the first of them."""
        ancestors = {new}
        stack = [new]
        while stack:
            for source in stack.pop().all_input_nodes:
                if source not in ancestors:
                    ancestors.add(source)
                    stack.append(source)
        readers = [user for user in old.users if user not in ancestors]
        first = min(readers, default=None)
        for node in list(self.draft.graph.nodes):
            if first is not None and node in ancestors and node.op.startswith("call") and first < node:
                first.prepend(node)
        for reader in readers:
            reader.replace_input_with(old, new)
        self.draft.mark()
