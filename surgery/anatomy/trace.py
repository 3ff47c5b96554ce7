"""The exported graph of a model's shadow, with the facts that every rule needs: owners, weights, what depends on what.

`torch.export` (strict=False, on the meta device) keeps `linear` and `scaled_dot_product_attention` whole and notes for
each node the module it came from.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import operator
import re
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from surgery.anatomy.einsum import Products
from surgery.anatomy.failure import failure
from surgery.anatomy.mutation import dependencies, written
from surgery.anatomy.shadow import Shadow, on_shapes, shadow

EXPORTING = threading.RLock()  # what is silenced is the process's
CALL = re.compile(r"@\d+")
HIDDEN = torch.tensor(-1e30, dtype=torch.float64)


@dataclass
class Trace:
    """An exported graph, in execution order, and its inputs.

    weights: placeholder node -> name of the parameter or buffer in the shadow (one name of several where tied).
    given: placeholder node -> the example tensor it stands for.
    buffers: placeholder node -> a buffer of the model, a tensor in a plain attribute or one that the code makes of
        numbers, that has values and keeps them: a triangle, positions.
    reads, readers: what each node depends on and what depends on it, writes into memory included.
    writes: (node, operand) -> what wrote into the operand's memory before the node reads it.
    """

    nodes: list[fx.Node]
    shadow: Shadow
    weights: dict[fx.Node, str]
    parameters: frozenset[fx.Node]
    given: dict[fx.Node, torch.Tensor]
    outputs: list[fx.Node]
    root: nn.Module
    buffers: dict[fx.Node, torch.Tensor] = field(default_factory=dict)
    order: dict[fx.Node, int] = field(default_factory=dict)
    reads: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    readers: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    writes: dict[tuple[fx.Node, fx.Node], list[fx.Node]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.order = {node: place for place, node in enumerate(self.nodes)}
        self.reads, self.writes = dependencies(self.nodes)
        self.readers = {node: [] for node in self.nodes}
        for node, sources in self.reads.items():
            for source in sources:
                self.readers[source].append(node)


def trace(model: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Trace:
    """Export the model's shadow. Raises ModelError S202 naming the module and the line that cannot be exported."""
    with quiet():
        try:
            double = shadow(model)
            return on_shapes(lambda: attempt(model, double, arguments, keywords))
        except Exception:
            # A model whose forward cannot do without some layer: take the long way before giving up.
            try:
                double = shadow(model, once=False)
                return on_shapes(lambda: attempt(model, double, arguments, keywords))
            except Exception as error:
                raise failure(model, error) from error


def attempt(model: nn.Module, double: Shadow, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Trace:
    def on_meta(value: Any) -> Any:
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    config: Any = getattr(double.module, "config", None)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    multiply_experts(double.module, "grouped_mm")
    takes = inspect.signature(double.module.forward).parameters
    if hasattr(config, "to_dict") and "use_cache" in takes:
        keywords = {**keywords, "use_cache": False}
    with Products():
        program = torch.export.export(
            double.module, pytree.tree_map(on_meta, arguments), pytree.tree_map(on_meta, keywords), strict=False
        )
    inline(program.graph_module)
    signature = program.graph_signature
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    named.update(signature.inputs_to_lifted_tensor_constants)
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    tensors = iter(pytree.tree_leaves((arguments, keywords)))
    given = {}
    for spec in signature.input_specs:
        if spec.kind.name == "USER_INPUT":
            value = next(tensors)
            if isinstance(value, torch.Tensor):
                given[placeholders[spec.arg.name]] = numbers(value)
    users = set(signature.user_outputs)
    weights = {placeholders[name]: target for name, target in named.items() if name in placeholders}
    changing = written(list(program.graph.nodes))
    held = {**program.constants, **dict(kept(model))}
    real = {name: value for name, value in held.items() if isinstance(value, torch.Tensor) and not value.is_meta}
    last = next(node for node in program.graph.nodes if node.op == "output")
    outputs = [node for node in last.all_input_nodes if node.name in users]
    return Trace(
        nodes=list(program.graph.nodes),
        shadow=double,
        weights=weights,
        parameters=frozenset(placeholders[name] for name in signature.inputs_to_parameters),
        given=given,
        outputs=outputs,
        root=program.graph_module,
        buffers={
            **{node: real[name] for node, name in weights.items() if name in real and node not in changing},
            **{node: HIDDEN for node in placeholders.values() if hides(node)},
        },
    )


def kept(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """What modules hold but for parameters: buffers, and plain attributes."""
    for path, module in model.named_modules(remove_duplicate=False):
        for name, value in (*module._buffers.items(), *vars(module).items()):
            if not isinstance(value, nn.Parameter):
                yield f"{path}.{name}".lstrip("."), value


def multiply_experts(double: nn.Module, how: str) -> None:
    """Let transformers' experts multiply in one way: `grouped_mm` shows which weight meets which input.

    Without weights only `batched_mm` runs whatever the dtype and the sizes.
    """
    for module in double.modules():
        config: Any = module.__dict__.get("config")
        if getattr(config, "_experts_implementation_internal", None) not in (None, how):
            config._experts_implementation_internal = how


def inline(root: fx.GraphModule) -> None:
    """Put regions that export keeps apart (no_grad, autocast) back where they run."""
    for node in list(root.graph.nodes):
        places = [place for place, arg in enumerate(node.args) if isinstance(arg, fx.Node) and arg.op == "get_attr"]
        held = [getattr(root, str(node.args[place].target), None) for place in places]
        if node.op != "call_function" or len(held) != 1 or not isinstance(held[0], fx.GraphModule):
            continue
        region = held[0].graph
        if any(inner.op == "get_attr" for inner in region.nodes):
            continue
        formal = [inner for inner in region.nodes if inner.op == "placeholder"]
        with root.graph.inserting_before(node):
            copied: Any = root.graph.graph_copy(region, dict(zip(formal, node.args[places[0] + 1 :], strict=True)))
        if isinstance(copied, (tuple, list)):
            for user in list(node.users):
                if user.target is operator.getitem:
                    user.replace_all_uses_with(copied[user.args[1]])
                    root.graph.erase_node(user)
        else:
            node.replace_all_uses_with(copied)
        if not node.users:
            root.graph.erase_node(node)


def numbers(value: torch.Tensor) -> torch.Tensor:
    """An example input's values; zeros for one that has none."""
    return torch.zeros(value.shape, dtype=value.dtype) if value.is_meta else value.detach().cpu()


def hides(node: fx.Node) -> bool:
    """Whether a node is a number that the code made, to stand where a mask says no; on meta it has no value."""
    aten: Any = torch.ops.aten
    if not node.name.startswith("c_") or "lifted_tensor" not in node.name:
        return False
    value = node.meta["val"]
    while [user.target for user in node.users] == [aten.detach_.default]:
        node = next(iter(node.users))
    masks = (aten.where.self, aten.masked_fill.Tensor)
    fills = [user for user in node.users if user.target in masks and user.args[2] is node]
    number = value.dim() == 0 and value.is_floating_point()
    return number and 0 < len(fills) == len(node.users) and all(map(weighed, fills))


def weighed(scores: fx.Node, steps: int = 3) -> bool:
    """Whether a softmax reads these scores, or what is made of them in a few steps."""
    if steps == 0:
        return False
    return any("softmax" in str(user.target) or weighed(user, steps - 1) for user in scores.users)


def owner(node: fx.Node) -> str:
    """Path of the innermost module whose forward made this node."""
    stack = node.meta.get("nn_module_stack") or {}
    return CALL.sub("", str(list(stack.values())[-1][0])) if stack else ""


def call_of(node: fx.Node) -> str:
    """Which call of the innermost module made this node: two calls of one module differ in it."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack)[-1]) if stack else ""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Export's own warnings, logs and prints say nothing about the model; its failures come as exceptions."""
    names = ("torch.export", "torch._export", "torch._subclasses.fake_tensor", "torch.fx", "transformers")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    with EXPORTING, warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
