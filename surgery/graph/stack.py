"""Experts' stacked weights: tensors (experts, out, in) that a module reads from itself, rewritten where it reads them.

The module keeps its tensors under their names and gets a child, whose graph takes them as they are stored to what the
module is to read. Its class becomes one derived from its own, in which reading such a tensor goes through the child;
how the module multiplies with it (grouped products, one expert after the other) is none of our business.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.anatomy.parts import Part
from surgery.errors import GraphError
from surgery.graph.draft import AnyDraft
from surgery.graph.module import Rewritten, without
from surgery.graph.site import Site

CHILD = "surgery_experts"


class Stacks(Rewritten):
    """The child: tensors as they are stored -> tensors to read, one for each in the order of `names`."""

    @property
    def names(self) -> tuple[str, ...]:
        """The module's parameters that the graph takes."""
        return tuple(str(node.target) for node in self.full.nodes if node.op == "placeholder")


def add_stacked(
    weight: Tensor, a: Tensor, b: Tensor, scale: float, transposed: bool, channels: Tensor | None = None
) -> Tensor:
    """weight + scale * b a, matrix by matrix, in weight's dtype and rounded once.

    weight: (experts, out, in), or (experts, in, out) where it is `transposed`. a: (experts, rank, in);
    b: (experts, out, rank). channels: the outputs that b is of; others keep their bits.
    """
    left, right = (a.transpose(1, 2), b.transpose(1, 2)) if transposed else (b, a)
    with torch.autocast(weight.device.type, enabled=False):  # a weight of another dtype is not what the module expects
        dim = 2 if transposed else 1
        part = weight if channels is None else torch.index_select(weight, dim, channels)
        sum_ = torch.baddbmm(part.to(a.dtype), left, right, alpha=scale).to(weight.dtype)
        return sum_ if channels is None else torch.index_copy(weight, dim, channels, sum_)


class StackDraft(AnyDraft[Stacks]):
    """The stacked weights of one module being rewritten. anew: leave out what is there already."""

    makes = Stacks

    def __init__(self, module: nn.Module, part: Part, hollow: bool = False, anew: bool = False) -> None:
        held = module._modules.get(CHILD)
        super().__init__(part.path, hollow, held if isinstance(held, Stacks) else None)
        self.module = module
        if self.standing is not None and not anew:
            self.go_on(self.standing)
        else:
            self.original, self.graph = nn.Module().train(module.training), fx.Graph()
            self.graph.output(())

    @property
    def home(self) -> str:
        """Where its tensors will be."""
        return f"{self.path}.{CHILD}".lstrip(".")

    def stored(self, name: str) -> Tensor:
        """The module's own tensor."""
        tensor = self.module._parameters.get(name)
        if tensor is None or tensor.dim() != 3:
            raise GraphError.of(
                "S381",
                f"{self.path}.{name} is no stack of matrices that can be adapted",
                help=f'leave it out with `except "{self.path}"`',
            )
        return tensor

    def value(self, name: str) -> fx.Node:
        """What is to be read for a parameter so far."""
        nodes: list[fx.Node] = list(self.graph.nodes)
        inputs = [node for node in nodes if node.op == "placeholder"]
        (end,) = (node for node in nodes if node.op == "output")
        names, values = [str(node.target) for node in inputs], list(end.all_input_nodes)
        if name in names:
            return values[names.index(name)]
        with self.graph.inserting_before(next(node for node in nodes if node.op != "placeholder")):
            new = self.graph.placeholder(name)
        end.args = ((*values, new),)
        return new

    def install(self, model: nn.Module) -> Stacks:
        """Let the module at the path read through the graph."""
        made = self.finish()
        attach(model.get_submodule(self.path), made)
        return made


class StackSite(Site):
    """One stack, or some output channels of each of its matrices, as one statement sees it."""

    draft: StackDraft  # type: ignore[assignment]

    def full_name(self, name: str) -> str:
        """With the stack's name in it: one child holds what belongs to all stacks of its module."""
        return super().full_name(f"{name}_{self.part.parameter}")

    @property
    def dtype(self) -> torch.dtype:
        return self.draft.stored(self.part.parameter).dtype

    @property
    def device(self) -> torch.device:
        return torch.device("meta") if self.draft.hollow else self.draft.stored(self.part.parameter).device

    def channels(self) -> fx.Node | None:
        """Indices of this part's output channels, None when they are all."""
        if self.part.channels is None:
            return None
        name = f"{self.part.parameter}_{self.part.name}_channels"
        if name not in self.draft.root._buffers:
            device = self.draft.stored(self.part.parameter).device
            self.draft.root.register_buffer(name, self._runs().to(device), persistent=False)
        return self._get(name)

    def add_to_weight(self, a: fx.Node, b: fx.Node, scale: float) -> None:
        """Let the module read weight + scale * b a on the part's channels; switched off, the weight as it is stored."""
        before = self.draft.value(self.part.parameter)
        joint = self.call(add_stacked, before, a, b, scale, self.part.transposed, self.channels())
        joint.meta["joint"] = self.name
        before.replace_all_uses_with(joint, delete_user_cb=lambda user: user.op == "output")

    def _get(self, full: str) -> fx.Node:
        nodes: list[fx.Node] = list(self.draft.graph.nodes)
        for node in nodes:
            if node.op == "get_attr" and node.target == full:
                return node
        first = next(node for node in nodes if node.op != "placeholder")
        with self.draft.graph.inserting_before(first):
            return self._ours(self._unchecked(full))


def attach(module: nn.Module, made: Stacks) -> None:
    """Let a module read its stacks through a graph."""
    detach(module)
    module.add_module(CHILD, made)
    module.__class__ = _reading(type(module), made.names)  # type: ignore[arg-type]


def detach(module: nn.Module) -> None:
    """Let a module read its stacks as they are stored."""
    if isinstance(module._modules.pop(CHILD, None), Stacks):
        module.__class__ = type(module).__mro__[1]


def fold_into(module: nn.Module, wanted: frozenset[str]) -> None:
    """Store what the module reads with these branches, and leave the others on it as they are.

    A tensor that would not change stays the same object.
    """
    made: Any = module._modules[CHILD]
    training, off, others = made.training, made.off, made.branches() - wanted
    made.switch(others)
    with torch.no_grad():
        values = made.eval()(*(module._parameters[name] for name in made.names))
    made.train(training)
    for name, value in zip(made.names, values, strict=True):
        before = module._parameters[name]
        if before is None or not torch.equal(before, value):
            module._parameters[name] = nn.Parameter(value, requires_grad=False)
    if others:
        left = _left(made, wanted)
        left.switch(off - wanted)
        attach(module, left)
    else:
        detach(module)


def _left(made: Stacks, merged: frozenset[str]) -> Stacks:
    """The child without the branches that were merged, holding the tensors of the others."""
    graph, root = without(made.full, merged), nn.Module()
    for store in ("_parameters", "_buffers", "_modules"):
        root.__dict__[store] = dict(made.__dict__[store])
    held = {str(node.target).partition(".")[0] for node in graph.nodes if node.op in ("get_attr", "call_module")}
    for name in set(made.added) - held:
        for store in ("_parameters", "_buffers", "_modules"):
            root.__dict__[store].pop(name, None)
    root._non_persistent_buffers_set = set(made._non_persistent_buffers_set)
    left = Stacks.build(root, graph, made.original, tuple(name for name in made.added if name in held))
    left.follow(made)
    return left


@cache
def _reading(cls: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """A class like `cls` whose instances read these parameters through their child."""

    def values(self: nn.Module) -> tuple[Tensor, ...]:
        return self._modules[CHILD](*[self._parameters[name] for name in names])  # type: ignore[misc,no-any-return]

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The class's own forward, on a stand-in whose stacks are computed once, however often they are read."""
        if torch.compiler.is_compiling():  # which takes what is computed twice once, and knows no stand-ins
            return cls.forward(self, *args, **kwargs)
        once = object.__new__(cls)
        made = dict(zip(names, values(self), strict=True))
        once.__dict__.update(self.__dict__)
        once.__dict__.update(made)
        out = cls.forward(once, *args, **kwargs)
        self.__dict__.update({name: value for name, value in once.__dict__.items() if name not in made})
        return out

    def reader(index: int) -> Callable[[nn.Module], Tensor]:
        return lambda self: values(self)[index]

    reads = {name: property(reader(index)) for index, name in enumerate(names)}
    kept = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), {"forward": forward, **kept, **reads})
