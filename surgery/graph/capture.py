"""What a module computes, as a small graph: `linear(x, weight, bias)` or `embedding(ids, weight)`, tensors by name.

Plain maps are written down directly. Anything with a forward of its own is traced, so that what it really computes is
what is rewritten and merged, and refused where it cannot be traced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from surgery.errors import GraphError

# Modules that read the weights of their children instead of calling them, always or on a fast path.
READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


@dataclass
class Captured:
    """A graph and its landmarks.

    input: the placeholder. product: the linear or embedding node. weight: its operand, (out, in) for a linear map.
    stored: the get_attr node under `weight`. output: the product, later with the branches on it.
    plain: the module's own forward does just this, so that it can hold another weight of the same shape.
    """

    graph: fx.Graph
    input: fx.Node
    product: fx.Node
    weight: fx.Node
    stored: fx.Node
    output: fx.Node
    plain: bool = True

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored (in, out): transposed an odd number of times before the product."""
        node, turned = self.weight, False
        while node is not self.stored:
            turned ^= node.target is torch.t
            node = next(source for source in node.all_input_nodes if _reads(source, self.stored))
        return turned


def capture(module: nn.Module, path: str, parameter: str = "weight", parent: nn.Module | None = None) -> Captured:
    """The graph of a projection or lookup. parent: the module that calls it.

    Errors: GraphError S301 when the module cannot be traced, S302 when it has no single product with that parameter,
    S303 when the parent reads the weight without calling the module.
    """
    if isinstance(parent, READERS):
        raise GraphError.of(
            "S303",
            f"`{type(parent).__name__}` reads the weight of {path} itself and does not call the module",
            help=f'leave it out with `except "{path}"`',
        )
    if "forward" in vars(module):
        raise _untraceable(module, path, "its forward was replaced on the instance, by a hook or a patch")
    forward = type(module).forward
    if forward is nn.Linear.forward and parameter == "weight":
        return _linear("input", bias=module.bias is not None, transposed=False)
    if isinstance(module, nn.Embedding) and forward is nn.Embedding.forward and _looks_up_only(module):
        return _embedding(module.padding_idx)
    traced = _trace(module, path)
    found = _landmarks(traced, module, parameter)
    if found is None:
        raise GraphError.of(
            "S302",
            f"`{type(module).__name__}` at {path} does not use `{parameter}` in one linear product or lookup",
            help=f'leave it out with `except "{path}"`',
        )
    if _only_flattens(found, module):
        return _linear("x", bias=found.product.args[2] is not None, transposed=True)
    return found


def _untraceable(module: nn.Module, path: str, why: object) -> GraphError:
    return GraphError.of(
        "S301",
        f"cannot trace `{type(module).__name__}` at {path}: {why}",
        help=f'leave it out with `except "{path}"`, or give it a forward without such a decision',
    )


def _trace(module: nn.Module, path: str) -> fx.Graph:
    """The module's graph, the same in training and in evaluation."""
    training, sources, graph = module.training, set(), fx.Graph()
    try:
        for mode in (not training, training):
            module.train(mode)
            graph = fx.Tracer(autowrap_functions=()).trace(module)
            sources.add(graph.python_code("self").src)
    except Exception as error:
        raise _untraceable(module, path, error) from None
    finally:
        module.train(training)
    if len(sources) > 1:
        raise _untraceable(module, path, "it computes something else in training, by a flag that a graph would freeze")
    return graph


def _linear(argument: str, bias: bool, transposed: bool) -> Captured:
    graph = fx.Graph()
    x = graph.placeholder(argument)
    stored = weight = graph.get_attr("weight")
    if transposed:
        weight = graph.call_function(torch.t, (stored,))
    product = graph.call_function(F.linear, (x, weight, graph.get_attr("bias") if bias else None))
    graph.output(product)
    return Captured(graph, x, product, weight, stored, product)


def _looks_up_only(module: nn.Embedding) -> bool:
    return module.max_norm is None and not module.scale_grad_by_freq and not module.sparse


def _embedding(padding: int | None) -> Captured:
    graph = fx.Graph()
    ids = graph.placeholder("input")
    weight = graph.get_attr("weight")
    product = graph.call_function(F.embedding, (ids, weight, padding))
    graph.output(product)
    return Captured(graph, ids, product, weight, weight, product)


def _landmarks(graph: fx.Graph, module: nn.Module, parameter: str) -> Captured | None:
    """The landmarks of a traced graph, whose product is written as `linear` or `embedding` whatever it was."""
    for node in graph.nodes:
        if _transposes(node):  # however it is written
            node.op, node.target, node.args = "call_function", torch.t, node.args[:1]
    stored = [node for node in graph.nodes if node.op == "get_attr" and node.target == parameter]
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if len(stored) != 1 or not inputs:
        return None
    for node in list(graph.nodes):
        operands = _operands(node)
        if operands is None:
            continue
        x, weight, bias, flipped = operands
        if not (isinstance(x, fx.Node) and isinstance(weight, fx.Node)) or not _reads(weight, stored[0]):
            continue
        if node.target is F.embedding:
            padding = node.args[2] if len(node.args) > 2 else node.kwargs.get("padding_idx")
            node.args, node.kwargs = (x, weight, padding), {}
        else:
            if flipped and weight.target is torch.t:
                weight = weight.args[0]
            elif flipped:
                with graph.inserting_before(node):
                    weight = graph.call_function(torch.t, (weight,))
            node.target, node.args, node.kwargs = F.linear, (x, weight, bias), {}
        return Captured(graph, inputs[0], node, weight, stored[0], node, plain=False)
    return None


def _transposes(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target == "t" or (node.target == "transpose" and set(node.args[1:]) in ({0, 1}, {-1, -2}))
    return node.op == "call_function" and node.target is getattr and node.args[1] == "T"


def _operands(node: fx.Node) -> tuple[Any, Any, Any, bool] | None:
    """x, weight, bias of a product, and whether its weight is (in, out); None for other nodes."""
    args: Any = (*node.args, *(None,) * 3)
    if node.target is F.linear:
        return args[0], args[1] or node.kwargs.get("weight"), args[2] or node.kwargs.get("bias"), False
    if node.target is F.embedding and not {"max_norm", "sparse", "scale_grad_by_freq"} & _given(node):
        return args[0], args[1], None, False
    if node.target in (torch.matmul, torch.Tensor.matmul) or node.target == "matmul" or _is_at_sign(node):
        return args[0], args[1], None, True
    if node.target is torch.addmm and not node.kwargs:
        return args[1], args[2], args[0], True
    return None


def _given(node: fx.Node) -> set[str]:
    """Options of a lookup that are not at their default; the traced call of nn.Embedding gives them all in order."""
    names = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    given = {**dict(zip(names, node.args[2:], strict=False)), **node.kwargs}
    return {name for name, value in given.items() if value not in (None, False)}


def _is_at_sign(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "matmul"


def _reads(node: fx.Node, wanted: fx.Node) -> bool:
    """Whether a value is computed from the wanted one and no input."""
    if node is wanted:
        return True
    return node.op == "call_function" and any(_reads(source, wanted) for source in node.all_input_nodes)


def _only_flattens(found: Captured, module: nn.Module) -> bool:
    """Conv1D's way of writing a linear map: the product of the flattened input, in the input's shape again."""
    if found.product.target is not F.linear:
        return False
    x: Any
    x, weight, bias = found.product.args
    stored = weight.args[0] if isinstance(weight, fx.Node) and weight.target is torch.t else None
    names = {"weight": stored, "bias": bias}
    if any(not isinstance(n, fx.Node) or n.op != "get_attr" or n.target != name for name, n in names.items()):
        return False
    (end,) = (node.args[0] for node in found.graph.nodes if node.op == "output")
    if not (_is_view(x, found.input) and _is_view(end, found.product)):
        return False
    rows, width = (*x.args[1:], None, None)[:2]
    outputs = module.get_parameter("weight").shape[1]
    return rows == -1 and _is_width(width, found.input) and _is_shape(end.args[1:], found.input, outputs)


def _is_view(node: Any, of: fx.Node) -> bool:
    return isinstance(node, fx.Node) and node.target in ("view", "reshape") and node.args[0] is of


def _is_width(node: Any, x: fx.Node) -> bool:
    """x.size(-1)"""
    return isinstance(node, fx.Node) and node.target == "size" and node.args == (x, -1)


def _is_shape(args: tuple[Any, ...], x: fx.Node, outputs: int) -> bool:
    """x.size()[:-1] + (outputs,)"""
    if len(args) != 1 or not isinstance(args[0], fx.Node) or getattr(args[0].target, "__name__", "") != "add":
        return False
    head, tail = args[0].args
    if tail != (outputs,) or not isinstance(head, fx.Node) or getattr(head.target, "__name__", "") != "getitem":
        return False
    size, cut = head.args
    return isinstance(size, fx.Node) and size.target == "size" and size.args == (x,) and cut == slice(None, -1, None)
