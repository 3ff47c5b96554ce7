"""How a model calls its attention modules: which optional arguments it passes, seen in one call on shapes alone."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from surgery.anatomy.inputs import example
from surgery.anatomy.parts import Anatomy
from surgery.anatomy.shadow import on_shapes
from surgery.graph.attention_interface import through_interface


def observed(anatomy: Anatomy, model: nn.Module, example_inputs: tuple[Any, ...] | Mapping[str, Any] | None) -> Anatomy:
    """The anatomy with `given` of its attention parts filled in, where code is traced that has optional arguments.

    Where the model cannot be run on shapes, optional arguments count as not given.
    """
    asked = {
        part.path
        for part in anatomy.parts
        if part.kind == "attention"
        and _optional(module := model.get_submodule(part.path))
        and not through_interface(module)
    }
    if not asked:
        return anatomy
    given: dict[str, tuple[str, ...]] = {}
    shape = _shape_of(model)
    for path in asked:
        shape.get_submodule(path).register_forward_pre_hook(_recorder(path, given), with_kwargs=True)
    try:
        known = example(model) if example_inputs is None else example_inputs
        inputs = _pytree.tree_map(lambda each: each.to("meta") if isinstance(each, Tensor) else each, known)
        with torch.no_grad():
            on_shapes(lambda: shape(**inputs) if isinstance(inputs, Mapping) else shape(*inputs))
    except Exception:
        return anatomy
    parts = (replace(part, given=given[part.path]) if part.path in given else part for part in anatomy.parts)
    return replace(anatomy, parts=tuple(parts))


def _optional(module: nn.Module) -> bool:
    """Whether the module's forward has arguments with a default."""
    parameters = inspect.signature(module.forward).parameters.values()
    return any(each.default is not inspect.Parameter.empty for each in parameters)


def _recorder(path: str, given: dict[str, tuple[str, ...]]) -> Callable[..., None]:
    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        signature = inspect.signature(module.forward)
        passed = signature.bind(*args, **kwargs).arguments
        defaults = {name: each.default for name, each in signature.parameters.items()}
        given[path] = tuple(
            name
            for name, value in passed.items()
            if defaults[name] is not inspect.Parameter.empty
            and (isinstance(value, Tensor) or value is not defaults[name])
        )

    return record


def _shape_of(model: nn.Module) -> nn.Module:
    """A copy on the meta device, made without copying a tensor."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        bare = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(bare, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare
    return copy.deepcopy(model, memo)
