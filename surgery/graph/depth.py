"""Layers in another order: some left out, some copied, with their numbers and caches right."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from surgery.anatomy.inputs import example
from surgery.anatomy.parts import Part, Stack
from surgery.anatomy.stacks import Lists
from surgery.errors import GraphError, ModelError
from surgery.graph.shaping import Shaping
from surgery.graph.undo import configurations


def reorder(shaping: Shaping, stack: Stack, order: Sequence[int]) -> dict[int, str]:
    """Give a stack the layers `order`, by their index now; a second mention of one is a copy with tensors of its own.

    Lists that stand side by side are reordered together. Attributes that count the layers go on counting them.
    Returns the paths of copies of whole layers by their new index. Errors: GraphError S330 where the list holds more.
    """
    model, standing = shaping.model, shaping.order(stack)
    lists = Lists(model)
    paths = [path for path, first in lists.stack_of.items() if first == stack.path]
    counted = _counters(model, lists, paths)
    copies: dict[int, str] = {}
    for path in paths:
        container = model.get_submodule(path)
        members = list(container._modules.items())
        if [name for name, _ in members] != [str(index) for index in range(len(standing))]:
            raise GraphError.of(
                "S330", f"{path or type(model).__name__} holds more than layers, or has names of its own"
            )
        shared = _elsewhere(model, path) | {id(config): config for config in configurations(model)}
        seen: set[int] = set()
        container._modules.clear()
        for place, index in enumerate(order):
            layer = members[index][1]
            if index in seen and layer is not None:
                layer = copy.deepcopy(layer, dict(shared))
                copies[place] = f"{path}.{place}" if path else str(place)
            seen.add(index)
            container._modules[str(place)] = layer
            for inside, name, offset in counted[path]:
                module = _below(layer, inside)
                if module is not None and name in vars(module):
                    setattr(module, name, place + offset)
    shaping.layers[stack.name] = [standing[index] for index in order]
    return copies


def _elsewhere(model: nn.Module, path: str) -> dict[int, Any]:
    """Modules and tensors of a list that stand outside of it as well, which copies share with their originals."""
    everywhere, inside = _named(model), _named(model.get_submodule(path))
    total, own = Counter(map(id, everywhere)), Counter(map(id, inside))
    return {id(each): each for each in inside if total[id(each)] > own[id(each)]}


def _named(module: nn.Module) -> list[Any]:
    """Modules and tensors, one in two places twice."""
    modules = module.named_modules(remove_duplicate=False)
    tensors = module.named_parameters(remove_duplicate=False)
    return [each for _, each in (*modules, *tensors)]


def _counters(model: nn.Module, lists: Lists, paths: Sequence[str]) -> dict[str, list[tuple[str, str, int]]]:
    """Attributes (module in the layer, name, offset) that are each layer's index plus an offset, in two at least."""
    found = {}
    for path in paths:
        layers = list(model.get_submodule(path)._modules.values())
        seen: dict[tuple[str, str], set[int]] = {}
        count: Counter[tuple[str, str]] = Counter()
        for index, layer in enumerate(layers):
            for inside, module in layer.named_modules() if layer is not None else ():
                for name, value in vars(module).items():
                    if type(value) is int:
                        seen.setdefault((inside, name), set()).add(value - index)
                        count[inside, name] += 1
        found[path] = [
            (*key, next(iter(offsets))) for key, offsets in seen.items() if len(offsets) == 1 and count[key] > 1
        ]
    return found


def _below(layer: nn.Module | None, path: str) -> nn.Module | None:
    try:
        return None if layer is None else layer.get_submodule(path)
    except AttributeError:
        return None


def zero_rows(module: nn.Module, part: Part) -> None:
    """Let the rows of a part, and their bias, be zero, in tensors of their own; of a stack, those of every expert."""
    weight = module._parameters[part.parameter]
    stacked = weight is not None and weight.dim() == 3
    for name in filter(None, (part.parameter, part.bias)):
        tensor = module._parameters.get(name)
        if tensor is None:
            continue
        new = tensor.detach().clone()
        turned = part.transposed and name == part.parameter
        wide = new.movedim(-1 if turned else int(stacked), 0)
        for start, stop in part.channels or ((0, wide.shape[0]),):
            wide[start:stop] = 0
        module._parameters[name] = nn.Parameter(new, requires_grad=tensor.requires_grad)


def check_silent(paths: Iterable[str], shaping: Shaping) -> None:
    """Run the model once and see that these layers hand on the bits they read.

    Without inputs only transformers models are checked.
    Errors: GraphError S331 where a layer changes something.
    """
    model, inputs = shaping.model, shaping.inputs
    if inputs is None:
        try:
            inputs = example(model)
        except ModelError:
            return
    changed: list[str] = []
    handles = []
    for path in paths:
        hook = partial(_compare, path, changed)
        handles.append(model.get_submodule(path).register_forward_hook(hook, with_kwargs=True))
    mode = model.training
    try:
        with torch.no_grad():
            model.eval()
            model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    finally:
        model.train(mode)
        for handle in handles:
            handle.remove()
    if changed:
        raise GraphError.of(
            "S331",
            f"the copy {changed[0]} is not silent: it adds something beside what its output maps compute",
            help="leave `silent` out, or repeat other layers",
        )


def _compare(path: str, changed: list[str], module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    floats = [
        [each for each in tree_leaves(value) if isinstance(each, Tensor) and each.is_floating_point()]
        for value in ((args, kwargs), output)
    ]
    if floats[0] and floats[1] and not torch.equal(floats[0][0], floats[1][0]):
        changed.append(path)
