"""Attention calls in plain torch code: the module that makes one is traced, and the call in its graph is found.

Two forms are known: `scaled_dot_product_attention`, and product -> (scale, mask) -> softmax -> product. Children stay
calls, so what they are (rewritten too, perhaps) does not matter here.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from surgery.anatomy.einsum import shared
from surgery.errors import GraphError
from surgery.graph.attention_math import absent, attend
from surgery.graph.tracer import Tracer, makers_traced

PRODUCTS: set[Any] = {torch.matmul, torch.bmm, operator.matmul, shared, "matmul", "bmm", "__matmul__"}
SOFTMAX: set[Any] = {F.softmax, torch.softmax, "softmax"}
CONSTANTS = (bool, int, float, str)
NUMBER = "number"  # in the meta of a tensor that is the same for every key
# Of what they read, they take the shape or the dtype and no number.
SHAPED = (torch.full_like, torch.zeros_like, torch.ones_like, torch.empty_like, "size", "new_full", "new_tensor")
FACTS = ("dtype", "device", "shape")


def trace(module: nn.Module, path: str, given: frozenset[str] = frozenset()) -> fx.Graph:
    """The graph of a module's forward, which follows the module's mode where dropout depends on it.

    given: names of the arguments that the model passes; others stay at their defaults, and say so when they do not.
    Raises GraphError S341 naming the module and the line where tracing stopped.
    """
    was = module.training
    try:
        module.training = False
        graph = _trace(module, path, given)
        module.training = True
        other = _trace(module, path, given)
    finally:
        module.training = was
    _follow_mode(graph, other, module, path)
    return graph


def _trace(module: nn.Module, path: str, given: frozenset[str]) -> fx.Graph:
    parameters = inspect.signature(module.forward).parameters
    defaults = {name: each.default for name, each in parameters.items() if name not in given}
    constant = {name: value for name, value in defaults.items() if value is None or isinstance(value, CONSTANTS)}
    try:
        with makers_traced():
            tracer = Tracer()
            graph = tracer.trace(module, constant)
        graph.constants = tracer.constants  # type: ignore[attr-defined]
        for node in graph.find_nodes(op="placeholder"):
            name = str(node.target).removesuffix("_1")  # fx renames what it takes for constant
            node.target = name if name in constant else node.target
        for node in graph.find_nodes(op="get_attr"):
            held = tracer.constants.get(str(node.target), getattr(module, str(node.target), None))
            if isinstance(held, Tensor) and held.shape[-1:] in ((), (1,)):
                node.meta[NUMBER] = True
        return graph
    except Exception as error:
        line = _line(module, error)
        raise GraphError.of(
            "S341",
            f"cannot trace the attention of `{type(module).__name__}` at {path}{line}: {_why(error)}",
            help="its forward decides on values or takes what is no tensor; give the attention a module of its own",
        ) from None


def _why(error: Exception) -> str:
    """What stopped a trace, in a few words; fx says it in its own terms, and at length."""
    first = str(error).strip().split("\n")[0]
    if isinstance(error, fx.proxy.TraceError):
        return "it branches on, or loops over, what is known only when it runs"
    return first if first and "Proxy" not in first and "__" not in first else "it computes with what is no tensor yet"


def _line(module: nn.Module, error: BaseException) -> str:
    """The last line of the module's own file in a traceback."""
    try:
        file = inspect.getsourcefile(type(module))
    except TypeError:
        return ""
    place, trail = "", error.__traceback__
    while trail is not None:
        if trail.tb_frame.f_code.co_filename == file:
            place = f" ({file}:{trail.tb_lineno})"
        trail = trail.tb_next
    return place


class ByMode(nn.Module):
    """One of two constants, by whether the module is training."""

    def __init__(self, evaluating: Any, training: Any) -> None:
        super().__init__()
        self.values = (evaluating, training)

    def forward(self) -> Any:
        return self.values[self.training]


def _follow_mode(graph: fx.Graph, other: fx.Graph, module: nn.Module, path: str) -> None:
    """Where the graphs of the two modes differ in a constant, let the graph ask for it."""
    ours, theirs = list(graph.nodes), list(other.nodes)
    if [(n.op, n.target, n.name) for n in ours] != [(n.op, n.target, n.name) for n in theirs]:
        raise GraphError.of(
            "S341",
            f"`{type(module).__name__}` at {path} computes its attention in two ways, in training and out of it",
            help="let the two differ in an amount of dropout only",
        )
    modes: dict[str, ByMode] = {}

    def differing(node: fx.Node, mine: Any, yours: Any) -> Any:
        if isinstance(mine, (tuple, list)) and isinstance(yours, (tuple, list)) and len(mine) == len(yours):
            return type(mine)(differing(node, a, b) for a, b in zip(mine, yours, strict=True))
        if isinstance(mine, slice) and isinstance(yours, slice):
            ends = ((mine.start, yours.start), (mine.stop, yours.stop), (mine.step, yours.step))
            return slice(*(differing(node, a, b) for a, b in ends))
        if isinstance(mine, fx.Node) or mine == yours:
            return mine
        name = f"by_mode_{len(modes)}"
        modes[name] = ByMode(mine, yours)
        with graph.inserting_before(node):
            return graph.create_node("call_module", name, (), {})

    for node, twin in zip(ours, theirs, strict=True):
        node.args = tuple(differing(node, a, b) for a, b in zip(node.args, twin.args, strict=True))
        node.kwargs = {key: differing(node, value, twin.kwargs[key]) for key, value in node.kwargs.items()}
    graph.modes = modes  # type: ignore[attr-defined]


def landmarks(graph: fx.Graph, module: nn.Module, path: str) -> dict[str, fx.Node]:
    """The call's nodes: query, key, value, core, out; by hand also `scores`, what the softmax reads.

    Raises GraphError S342 when there is no such call, S343 when there are several.
    """
    found = [marks for node in list(graph.nodes) for marks in _call(graph, node, module)]
    if not found:
        raise GraphError.of(
            "S342",
            f"`{type(module).__name__}` at {path} has no attention call that can be rewritten",
            help="known forms: F.scaled_dot_product_attention, or a product, scale and mask, softmax, a product",
        )
    if len(found) > 1:
        raise GraphError.of(
            "S343",
            f"`{type(module).__name__}` at {path} makes {len(found)} attention calls",
            help="give each call a module of its own",
        )
    return found[0]


def _call(graph: fx.Graph, node: fx.Node, module: nn.Module) -> Iterator[dict[str, fx.Node]]:
    if node.op == "call_function" and node.target is F.scaled_dot_product_attention:
        yield _plain(graph, node)
    elif (node.target in SOFTMAX or isinstance(_child(module, node), nn.Softmax)) and _over_keys(module, node):
        scores = node.args[0]
        products = [each for each in _downstream(node) if each.target in PRODUCTS]
        product = _source(scores) if isinstance(scores, fx.Node) else None
        if product is not None and products:
            out = products[0]
            query, key, value = product.args[0], product.args[1], out.args[1]
            operands = {"query": query, "transposed_key": key, "value": value, "scores": scores, "product": product}
            nodes = {name: each for name, each in operands.items() if isinstance(each, fx.Node)}
            if all(_before(each, node) for each in nodes.values()):
                yield {**nodes, "core": node, "product_out": out, "out": out}


def _over_keys(module: nn.Module, node: fx.Node) -> bool:
    """Whether a softmax is taken over the last dimension."""
    child: Any = _child(module, node)
    places = node.args[1:2]
    return (child.dim if child is not None else node.kwargs.get("dim", places[0] if places else None)) in (-1, 3)


def _child(module: nn.Module, node: fx.Node) -> nn.Module | None:
    return dict(module.named_modules()).get(str(node.target)) if node.op == "call_module" else None


def _plain(graph: fx.Graph, node: fx.Node) -> dict[str, fx.Node]:
    """scaled_dot_product_attention as a call of ours that takes its arguments by place."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    with graph.inserting_before(node):
        mask = given.get("attn_mask")
        mask = mask if isinstance(mask, fx.Node) else graph.call_function(absent)
        rest = (given.get("is_causal", False), given.get("dropout_p", 0.0), given.get("scale"))
        operands: Any = (given["query"], given["key"], given["value"], mask)
        new = graph.call_function(attend, (*operands, *rest, given.get("enable_gqa", False)))
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return {**dict(zip(("query", "key", "value", "mask"), operands, strict=True)), "core": new, "out": new}


def _source(scores: fx.Node) -> fx.Node | None:
    """The product at the start of the chain that ends in `scores`."""
    chain = scale_chain(scores)
    return chain[0] if chain else None


def scale_chain(scores: fx.Node) -> list[fx.Node]:
    """The nodes from the product of queries and keys to what the softmax reads, by first operands; empty if none."""
    chain = [scores]
    while chain[0].target not in PRODUCTS:
        sources = [each for each in chain[0].all_input_nodes if _reaches_product(each)]
        if len(sources) != 1:
            return []
        chain.insert(0, sources[0])
    return chain


def _reaches_product(node: fx.Node) -> bool:
    seen: set[fx.Node] = set()
    pending = [node]
    while pending:
        each = pending.pop()
        if each in seen:
            continue
        seen.add(each)
        if each.target in PRODUCTS:
            return True
        if each.op in ("call_function", "call_method") and not _takes_shape(each):
            pending += each.all_input_nodes
    return False


def _takes_shape(node: fx.Node) -> bool:
    return node.target in SHAPED or (node.target is getattr and node.args[1] in FACTS)


def _before(node: fx.Node, core: fx.Node) -> bool:
    """Move a node before another one, with all that it is made of; False where it is made of that one."""
    behind, each = list[fx.Node](), core
    while each.op != "output":
        behind.append(each)
        each = each.next
    needed, pending = set[fx.Node](), [node]
    while pending:
        each = pending.pop()
        if each in behind and each not in needed:
            needed.add(each)
            pending += each.all_input_nodes
    for each in behind if core not in needed else ():
        if each in needed:
            core.prepend(each)
    return core not in needed


def _downstream(node: fx.Node) -> Iterator[fx.Node]:
    """Users of a softmax, users of these, and so on, in order, the weights being the first operand."""
    pending = list(node.users)
    while pending:
        each = pending.pop(0)
        yield each
        if each.target not in PRODUCTS:
            pending += [user for user in each.users if user.args and user.args[0] is each]
