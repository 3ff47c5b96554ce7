"""Attention calls that go through transformers' AttentionInterface: found, and led through a graph of ours.

The attention module keeps its class and gets a child, `surgery_attention`, and a configuration of its own that names
the implementation `surgery`; that one calls the child. The model still makes its masks for the implementation it had.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from surgery.errors import GraphError
from surgery.graph.attention_count import calls
from surgery.graph.attention_math import Core

NAME = "surgery"
CHILD = "surgery_attention"
KNOWN = ("sdpa", "eager")


def surgery_attention_forward(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **keywords: Any
) -> tuple[Any, Any]:
    """The implementation that is registered under `surgery`."""
    out, weights = module.surgery_attention(module, query, key, value, attention_mask, keywords)
    return out, weights


def register() -> None:
    """Make the implementation known to transformers; doing it twice is doing it once."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, surgery_attention_forward)


def through_interface(module: nn.Module) -> bool:
    """Whether the module asks transformers for its attention implementation."""
    if "transformers" not in sys.modules or not hasattr(module, "config"):
        return False
    code = getattr(_forward(module), "__code__", None)
    return code is not None and "get_interface" in code.co_names


def out_of_reach(module: nn.Module, path: str, reason: str = "") -> GraphError | None:
    """GraphError S351 for a module of transformers that can be reached in no way, None for any other module.

    reason: why its code could not be traced. Code that works over a cache would be traced as if there were none.
    """
    cached = {"past_key_values", "past_key_value", "layer_past"} & set(inspect.signature(module.forward).parameters)
    if not type(module).__module__.startswith("transformers.") or not (cached or reason):
        return None
    return GraphError.of(
        "S351",
        f"`{type(module).__name__}` at {path} keeps its attention to itself: transformers' AttentionInterface does not "
        f"reach it, no cache takes its keys and values, and its code cannot be traced{reason and f' ({reason})'}",
        help="adapt this model with lora, or leave the place out with `except`",
    )


def core(module: nn.Module, path: str) -> Core:
    """The implementation that the module would call. Raises GraphError S340 for those that hide their mask from us."""
    held = getattr(module, CHILD, None)
    if held is not None:
        return held.core  # type: ignore[no-any-return]
    kind: Any = type(module)
    if (several := calls(kind)) > 1:
        raise GraphError.of(
            "S343",
            f"`{kind.__name__}` at {path} makes {several} attention calls, each with values of its own",
            help="adapt this model with lora, or leave the place out with `except`",
        )
    config: Any = module.config
    implementation = config._attn_implementation or "eager"
    names = _forward(module).__globals__
    if implementation not in KNOWN or "ALL_ATTENTION_FUNCTIONS" not in names:
        raise GraphError.of(
            "S340",
            f"the attention at {path} runs as '{implementation}', which a prefix cannot be put in front of",
            help="load the model with attn_implementation='sdpa' or 'eager'",
        )
    default = names.get("eager_attention_forward")
    if implementation == "eager" and (default is None or getattr(module, "reorder_and_upcast_attn", False)):
        raise GraphError.of(
            "S340",
            f"the attention at {path} runs as 'eager' in a way of its own",
            help="load the model with attn_implementation='sdpa'",
        )
    function: Callable[..., Any] = names["ALL_ATTENTION_FUNCTIONS"].get_interface(implementation, default)
    return Core(function, causal_without_mask=implementation == "sdpa")


def graph() -> tuple[fx.Graph, dict[str, fx.Node]]:
    """The call as it was, and its landmarks."""
    made = fx.Graph()
    module, query, key, value, mask, keywords = (
        made.placeholder(name) for name in ("module", "query", "key", "value", "attention_mask", "keywords")
    )
    call = made.create_node("call_module", "core", (module, query, key, value, mask, keywords), {})
    out = made.call_function(item, (call, 0))
    weights = made.call_function(item, (call, 1))
    made.output((out, weights))
    marks = {
        "module": module,
        "query": query,
        "key": key,
        "value": value,
        "mask": mask,
        "keywords": keywords,
        "core": call,
        "out": out,
    }
    return made, marks


def attach(module: nn.Module, child: nn.Module) -> None:
    """Lead the module's attention call through the child."""
    register()
    config: Any = module.config
    if getattr(module, CHILD, None) is None:
        child.core.config = config  # type: ignore[union-attr]
        own = copy.copy(config)
        own._attn_implementation_internal = NAME
        module.config = own
    module.add_module(CHILD, child)


def detach(module: nn.Module) -> None:
    """The module as it was."""
    child: Any = getattr(module, CHILD)
    module.config = child.core.config
    delattr(module, CHILD)


def _forward(module: nn.Module) -> Any:
    return inspect.unwrap(type(module).forward)


def item(pair: tuple[Any, Any], index: int) -> Any:
    """One of what the implementation gives."""
    return pair[index]
