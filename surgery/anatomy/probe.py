"""Runs a stretch of the exported graph on random float64 numbers: who feeds what, and how.

Weights never exist: whatever is not computed inside the stretch is a random number of the right shape.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from surgery.anatomy.trace import Trace

# Numbers in one random stand-in; a stretch that would need a whole stack of experts is not run.
LARGEST = 1 << 26
SKIPPED = ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain", "_assert_async")


class Unknown(Exception):
    """A stretch that cannot be run: sizes that depend on data, or an operator without a kernel here."""


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Static shape of a node's tensor, () for anything else. Raises Unknown when it depends on data."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return ()
    if not all(isinstance(size, int) for size in value.shape):
        raise Unknown(node.name)
    return tuple(value.shape)


def dtype_of(node: fx.Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


class Probe:
    """Random numbers for one stretch, always the same ones for the same node."""

    def __init__(self, trace: Trace, seed: int = 0) -> None:
        self.trace = trace
        self.seed = seed

    def random(self, node: fx.Node) -> Any:
        """A stand-in for a node: float64 of magnitude 0.5 to 1.5 and both signs; zeros for ints, True for bools."""
        shape, dtype = shape_of(node), dtype_of(node)
        if dtype is None or math.prod(shape) > LARGEST:
            raise Unknown(node.name)
        if dtype == torch.bool:
            return torch.ones(shape, dtype=dtype)
        if not dtype.is_floating_point:
            return torch.zeros(shape, dtype=dtype if not dtype.is_complex else torch.complex128)
        generator = torch.Generator().manual_seed(self.seed * 7919 + self.trace.order.get(node, 0))
        drawn = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
        return drawn + torch.where(drawn < 0, -0.5, 0.5)

    def run(self, targets: Iterable[fx.Node], known: Mapping[fx.Node, Any], cuts: Iterable[fx.Node] = ()) -> list[Any]:
        """Values of the targets, computed from `known` and from random numbers at the cuts and at the graph's inputs.

        Raises Unknown when some node cannot be evaluated.
        """
        targets = list(targets)
        # A copy: what is written into in place must not be a leaf, nor the caller's tensor.
        values: dict[fx.Node, Any] = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in known.items()}
        stop = set(cuts) - set(known)
        needed: set[fx.Node] = set()
        waiting = [node for node in targets if node not in values]
        while waiting:
            node = waiting.pop()
            if node in needed or node in values:
                continue
            needed.add(node)
            if node not in stop:
                waiting.extend(self.trace.reads[node])
        for node in sorted(needed, key=lambda n: self.trace.order[n]):
            values[node] = self.random(node) if node in stop else self.value(node, values)
        return [values[node] for node in targets]

    def value(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        if node.op == "placeholder":
            return self.trace.given[node] if node in self.trace.given else self.random(node)
        if node.op == "get_attr":
            held: Any = self.trace.root
            for name in str(node.target).split("."):
                held = getattr(held, name)
            if isinstance(held, torch.Tensor):
                if held.is_meta:
                    return self.random(node)
                return held.double() if held.is_floating_point() else held
            return held
        if any(name in str(node.target) for name in SKIPPED):
            return None
        try:
            return call(node, values)
        except Unknown:
            raise
        except Exception as error:
            raise Unknown(f"{node.name}: {error}") from error


class Informed(Probe):
    """Knows the values of the model's buffers, where they have some: a mask may be one of them."""

    def value(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        known = self.trace.buffers.get(node)
        if known is None:
            return super().value(node, values)
        # A copy, as it may be written into.
        return known.detach().to("cpu", torch.float64 if known.is_floating_point() else known.dtype, copy=True)


def call(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """One operator, with every floating dtype made float64 and every device the CPU."""
    args: Any
    kwargs: Any
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: values[n])
    args, kwargs = fx.node.map_aggregate((args, kwargs), plain)
    target: Any = node.target
    inner = next((a for a in args if isinstance(a, fx.GraphModule)), None)
    if inner is not None:
        return inside(inner, args[list(map(id, args)).index(id(inner)) + 1 :])
    if target is operator.getitem:
        return args[0][args[1]]
    if target is torch.ops.aten.detach.default:  # what is not trained through is computed from all the same
        return args[0]
    return target(*args, **kwargs)


def inside(module: fx.GraphModule, inputs: tuple[Any, ...]) -> Any:
    """A region that export keeps as a graph of its own (no_grad, autocast)."""
    values: dict[fx.Node, Any] = {}
    remaining = iter(inputs)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(remaining)
        elif node.op == "output":
            return fx.node.map_arg(node.args[0], lambda n: values[n])
        elif node.op == "get_attr":
            values[node] = getattr(module, str(node.target))
        elif any(name in str(node.target) for name in SKIPPED):
            values[node] = None
        else:
            values[node] = call(node, values)
    raise Unknown("a region without outputs")


def plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else value
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        raise Unknown("a size that depends on data")
    return value


def gradients(
    outputs: list[torch.Tensor], inputs: list[torch.Tensor], seed: int = 1, retain: bool = False
) -> list[torch.Tensor | None]:
    """Gradient of a random linear functional of the outputs with respect to each input; None where none arrives."""
    live = [value for value in outputs if isinstance(value, torch.Tensor) and value.requires_grad]
    if not live:
        return [None] * len(inputs)
    generator = torch.Generator().manual_seed(seed)
    total = sum((v * torch.rand(v.shape, generator=generator, dtype=v.dtype).add(0.5)).sum() for v in live)
    return list(torch.autograd.grad(total, inputs, allow_unused=True, retain_graph=retain))  # type: ignore[arg-type]
