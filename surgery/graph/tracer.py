"""Traces what models write by hand: fx's tracer, and what it does not know of sizes, constants, einsum and einops."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.anatomy.einsum import as_product, shared

MAKERS = ("arange", "ones", "zeros", "full", "empty", "eye", "finfo")


class _Proxy(fx.Proxy):
    """Knows how many pieces it has where that is known: `(x, *y.chunk(2))` asks."""

    def __len__(self) -> int:
        count = _pieces(self.node)
        return super().__len__() if count is None else count


class Tracer(fx.Tracer):
    """Every child is a call; what is split into a known number of pieces can be taken apart in any way.

    constants: tensors that the forward makes of numbers, or keeps in plain attributes. fx would write them into the
    module, under other names each time.
    """

    proxy_buffer_attributes = True  # `self.mask[:, :length]` with a traced length

    def __init__(self) -> None:
        super().__init__(autowrap_functions=_einops())
        self.constants: dict[str, Tensor] = {}

    def create_arg(self, a: Any) -> Any:
        own = isinstance(a, nn.Parameter) or any(a is buffer for buffer in self.root.buffers())
        if own or not isinstance(a, Tensor):
            return super().create_arg(a)
        name = next((name for name, held in self.constants.items() if held is a), f"constant_{len(self.constants)}")
        self.constants[name] = a
        return self.create_node("get_attr", name, (), {})

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_proxy(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: Any, *names: Any, **more: Any) -> Any:
        def of_shared(*operands: Any) -> Any:
            return self.create_proxy("call_function", shared, operands, {})

        product = as_product(args, of_shared) if target is torch.einsum and not kwargs else None
        return super().create_proxy(kind, target, args, kwargs, *names, **more) if product is None else product

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def iter(self, obj: Any) -> Iterator[Any]:
        count = _pieces(obj.node)
        return super().iter(obj) if count is None else (obj[place] for place in range(count))


def _einops() -> tuple[Callable[..., Any], ...]:
    """What of einops stays a call, where the model's code has imported it."""
    einops = sys.modules.get("einops")
    return () if einops is None else (einops.rearrange, einops.repeat, einops.reduce)


def _pieces(node: fx.Node) -> int | None:
    """How many pieces a node gives, where its arguments say so."""
    amount = node.args[1] if len(node.args) > 1 else next(iter(node.kwargs.values()), None)
    if node.target in ("chunk", torch.chunk):
        return amount if isinstance(amount, int) else None
    if node.target in ("split", "split_with_sizes", torch.split):
        return len(amount) if isinstance(amount, (tuple, list)) else None
    if node.target in _einops() and isinstance(amount, str):
        first = node.kwargs.get(amount.partition("->")[2].split()[0])
        return first if isinstance(first, int) else None
    if node.target is operator.getitem and isinstance(amount, slice) and _is_shape(node.args[0]):
        start, stop, step = amount.start or 0, amount.stop, amount.step
        if step is None and isinstance(start, int) and (stop is None or isinstance(stop, int)):
            return (
                -start
                if stop is None and start < 0
                else stop - start
                if stop is not None and 0 <= start <= stop
                else None
            )
    return None


def _is_shape(node: Any) -> bool:
    """Whether a node is the shape of a tensor: as many numbers as are asked for are there, or the model fails."""
    return isinstance(node, fx.Node) and (node.target == "size" or (node.target is getattr and node.args[1] == "shape"))


@contextmanager
def makers_traced() -> Iterator[None]:
    """While tracing, `torch.ones(length, length)` with a traced length is a call in the graph, not a failure."""
    kept = {name: getattr(torch, name) for name in MAKERS}
    try:
        for name, function in kept.items():
            setattr(torch, name, _traceable(function))
        yield
    finally:
        for name, function in kept.items():
            setattr(torch, name, function)


def _traceable(function: Callable[..., Any]) -> Callable[..., Any]:
    def made(*args: Any, **kwargs: Any) -> Any:
        proxies: list[fx.Proxy] = []
        fx.node.map_aggregate((args, kwargs), lambda each: proxies.append(each) if isinstance(each, fx.Proxy) else None)
        if not proxies:
            return function(*args, **kwargs)
        return proxies[0].tracer.create_proxy("call_function", function, args, kwargs)

    return made
