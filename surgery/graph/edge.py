"""Edge sites: a sub-layer's output on its way into the residual stream, and the chain of branches that hang on it.

The graph is a child of the module whose output the edge is, called by a hook on it: whatever that module is (a
projection that is quantized and adapted itself, a dropout, a norm, a mixture of experts), nothing of it is rewritten
and its tensors keep their names. The sub-layer's input is brought along by a second hook.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.anatomy.parts import Part
from surgery.errors import GraphError
from surgery.graph.draft import AnyDraft
from surgery.graph.functions import add_branch
from surgery.graph.module import Rewritten, numbers
from surgery.graph.site import Site

CHILD = "surgery_edge"


class Edge(Rewritten):
    """The rewritten edge: (y, x) -> y with every branch, x being the sub-layer's input."""

    def reads_input(self) -> bool:
        """Whether a branch needs the sub-layer's input."""
        return reads_input(self.full)


class Tap:
    """A forward pre-hook that keeps the first floating tensor its module is called with, until the edge takes it.

    Both run in one forward of one layer, so that gradient checkpointing sees them together.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.value: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.is_floating_point() and value.shape[-1:] == (self.width,):
                self.value = value
                return

    def take(self) -> Tensor | None:
        """What was kept; it is not kept any longer."""
        value, self.value = self.value, None
        return value

    def __deepcopy__(self, memo: dict[int, Any]) -> Tap:
        copied = memo[id(self)] = Tap(self.width)
        return copied


class Pass:
    """A forward hook that sends a module's output, or the first tensor of several, through the module's edge."""

    def __init__(self, tap: Tap | None = None) -> None:
        self.tap = tap

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        edge = module._modules.get(CHILD)
        if edge is None:
            return output
        x = None if self.tap is None else self.tap.take()
        if isinstance(output, Tensor):
            return edge(output, x)
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            return (edge(output[0], x), *output[1:])
        raise GraphError.of(
            "S360", f"`{type(module).__name__}` gives a {type(output).__name__}, and an adapter after it needs a tensor"
        )


class EdgeDraft(AnyDraft[Edge]):
    """An edge being rewritten. anew: leave out what hangs there already."""

    makes = Edge

    def __init__(self, model: nn.Module, part: Part, hollow: bool = False, anew: bool = False) -> None:
        module = model.get_submodule(part.path)
        held = module._modules.get(CHILD)
        super().__init__(part.path, hollow, held if isinstance(held, Edge) else None)
        self.part = part
        self.dtype, self.device = _like(model, part.path)
        if self.standing is not None and not anew:
            self.go_on(self.standing)
        else:
            self.original, self.graph = nn.Module().train(module.training), untouched()

    @property
    def home(self) -> str:
        """Where its tensors will be."""
        return f"{self.path}.{CHILD}".lstrip(".")

    def install(self, model: nn.Module) -> Edge:
        """Put the edge on the module that stands at its path now: after every draft of that module."""
        made = self.finish()
        detach(model, self.part)
        attach(model, self.part, made)
        return made


class EdgeSite(Site):
    """One edge as one statement sees it."""

    draft: EdgeDraft  # type: ignore[assignment]

    @property
    def width(self) -> int:
        """Number of features."""
        return self.part.shape[0]

    @property
    def output(self) -> fx.Node:
        """y: the sub-layer's output with the branches that it has so far."""
        (end,) = (node for node in self.draft.graph.nodes if node.op == "output")
        node: Any = end.args[0]
        return node  # type: ignore[no-any-return]

    @property
    def input(self) -> fx.Node:
        """x: what the sub-layer reads, perhaps with its tokens in another shape."""
        node: fx.Node = next(node for node in self.draft.graph.nodes if node.op == "placeholder" and node.target == "x")
        return node

    @property
    def dtype(self) -> torch.dtype:
        return self.draft.dtype

    @property
    def device(self) -> torch.device:
        return torch.device("meta") if self.draft.hollow else self.draft.device

    def add_to_output(self, branch: fx.Node, then: str | None = None) -> None:
        """y + branch. then: the branch that comes next, and reads what this one gives, in whatever order they come."""
        joint = self.call(add_branch, self.output, branch)
        joint.meta["joint"], joint.meta["then"] = self.name, then
        (end,) = (node for node in self.draft.graph.nodes if node.op == "output")
        end.args = (joint,)
        self._in_order()

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        node = super().call(function, *args, **kwargs)
        node.meta["branch"] = self.name
        return node

    def module(self, name: str, module: nn.Module) -> Callable[..., fx.Node]:
        called = super().module(name, module)

        def marked(*args: Any) -> fx.Node:
            node = called(*args)
            node.meta["branch"] = self.name
            return node

        return marked

    def _in_order(self) -> None:
        """Lay the branches one behind the other: each reads what the one before it gives."""
        graph = self.draft.graph
        joints = {node.meta["joint"]: node for node in graph.nodes if "joint" in node.meta}
        y = next(node for node in graph.nodes if node.op == "placeholder" and node.target == "y")
        (end,) = (node for node in graph.nodes if node.op == "output")
        nodes = list(graph.nodes)
        before: dict[str, Any] = {name: joint.args[0] for name, joint in joints.items()}
        last = y
        for name in chain({name: joint.meta["then"] for name, joint in joints.items()}):
            for node in nodes:
                if node.meta.get("branch") == name:
                    node.replace_input_with(before[name], last)
                    end.prepend(node)
            last = joints[name]
        end.args = (last,)


def untouched() -> fx.Graph:
    """The graph of an edge that nothing hangs on: (y, x) -> y."""
    graph = fx.Graph()
    y = graph.placeholder("y")
    graph.placeholder("x")
    graph.output(y)
    return graph


def chain(following: dict[str, str | None]) -> list[str]:
    """Names in the order in which each comes right before the one it names; those that are not there yet, anyhow."""
    order: list[str] = []
    for name in sorted(following):
        run = []
        while name is not None and name in following and name not in order and name not in run:
            run.append(name)
            name = following[name]  # type: ignore[assignment]
        place = order.index(name) if name in order else len(order)
        order[place:place] = run
    return order


def reads_input(graph: fx.Graph) -> bool:
    """Whether the graph of an edge uses the sub-layer's input."""
    return any(node.op == "placeholder" and node.target == "x" and node.users for node in graph.nodes)


def holders(module: nn.Module) -> list[nn.Module]:
    """A module, and what it stands for where it was rewritten, which a merge puts back."""
    return [module, module.original] if isinstance(module, Rewritten) else [module]


def attach(model: nn.Module, part: Part, edge: Edge) -> None:
    """Hang an edge on the module of a part."""
    tap = None
    if edge.reads_input():
        assert part.input is not None, "planned where no module takes the sub-layer's input"
        tap = Tap(part.shape[0])
        for module in holders(model.get_submodule(part.input)):
            if tap not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(tap, with_kwargs=True)
    passing = Pass(tap)
    for module in holders(model.get_submodule(part.path)):
        module.add_module(CHILD, edge)
        if passing not in module._forward_hooks.values():  # the two of a rewritten module may share them
            module.register_forward_hook(passing)


def detach(model: nn.Module, part: Part) -> None:
    """Take the edge of a part off again, if there is one."""
    taps = []
    for module in holders(model.get_submodule(part.path)):
        module._modules.pop(CHILD, None)
        taps += [hook.tap for hook in module._forward_hooks.values() if isinstance(hook, Pass)]
        _drop(module._forward_hooks, lambda hook: isinstance(hook, Pass))
    for module in holders(model.get_submodule(part.input)) if part.input is not None else ():
        for key in _drop(module._forward_pre_hooks, lambda hook: any(hook is tap for tap in taps)):
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def attached(model: nn.Module, part: Part) -> Edge | None:
    """The edge of a part, where it is there and called."""
    module = model.get_submodule(part.path)
    edge = module._modules.get(CHILD)
    called = [hook for hook in module._forward_hooks.values() if isinstance(hook, Pass)]
    return edge if isinstance(edge, Edge) and len(called) == 1 else None


def bare(module: nn.Module) -> None:
    """Take the edge off a module that stands alone, such as a copy of one."""
    for held in holders(module):
        held._modules.pop(CHILD, None)
        _drop(held._forward_hooks, lambda hook: isinstance(hook, Pass))


def _drop(hooks: dict[int, Callable[..., Any]], mine: Callable[[Any], bool]) -> list[int]:
    keys = [key for key, hook in hooks.items() if mine(hook)]
    for key in keys:
        del hooks[key]
    return keys


def _like(model: nn.Module, path: str) -> tuple[torch.dtype, torch.device]:
    """Dtype and device of the numbers around a module: of the base's own, else of those nearest above it."""
    while (found := numbers(model.get_submodule(path))) is None and path:
        path = path.rpartition(".")[0]
    return found or (torch.get_default_dtype(), torch.device("cpu"))
