"""A weightless double of a model in which every repeated layer stands once: what is exported in its place.

The model itself is never touched, so there is nothing to restore. Parameters and buffers become meta tensors of the
same shape; a layer that looks like an earlier one of its list becomes an `Echo`, which passes its input on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils import _pytree as pytree

T = TypeVar("T")

SCALARS = (bool, int, float, complex, str, bytes, type(None), torch.dtype)


@dataclass(frozen=True)
class Shadow:
    """`module` is the double. `copies` maps the path of a representative to the paths of the layers it stands for."""

    module: nn.Module
    copies: dict[str, tuple[str, ...]]


class Echo(nn.Module):
    """Stands for a layer that is like another one: gives what that one gave, with its own input as the hidden state."""

    def __init__(self, original: nn.Module, last_output: list[Any]) -> None:
        super().__init__()
        self.__dict__["original"] = original
        self.__dict__["last_output"] = last_output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.last_output:
            return self.original(*args, **kwargs)
        leaves, structure = pytree.tree_flatten(self.last_output[0])
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.is_floating_point()]
        for hidden in given[:1]:
            for place, leaf in enumerate(leaves):
                if isinstance(leaf, torch.Tensor) and (leaf.shape, leaf.dtype) == (hidden.shape, hidden.dtype):
                    leaves[place] = hidden
                    break
        return pytree.tree_unflatten(leaves, structure)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["original"], name)

    def __getitem__(self, key: Any) -> Any:
        return self.original[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.original)

    def __len__(self) -> int:
        return len(self.original)

    def __bool__(self) -> bool:
        return True


def scalar(value: Any, position: int) -> Any:
    """What of an attribute tells layers apart. A number that follows the layer's position, or a float, does not."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return ("position", value - position)
    if isinstance(value, float):
        return ("float", value == 0.0)
    if isinstance(value, (tuple, list)) and all(isinstance(item, SCALARS) for item in value):
        return tuple(str(item) for item in value)
    if isinstance(value, SCALARS):
        return value
    return getattr(value, "__qualname__", None)


def signature(module: nn.Module, position: int) -> tuple[Any, ...]:
    """Two layers with equal signatures compute the same function of their weights.

    An integer counts both as itself and relative to the layer's position, see `same`.
    """
    attributes = tuple(
        (name, scalar(value, position), value if isinstance(value, int) else None)
        for name, value in sorted(vars(module).items())
        if name not in INTERNALS
    )
    tensors = tuple(
        (name, None if tensor is None else (tuple(tensor.shape), tensor.dtype))
        for table in (module._parameters, module._buffers)
        for name, tensor in table.items()
    )
    children = tuple(
        (name, None if child is None else signature(child, position)) for name, child in module._modules.items()
    )
    return type(module), attributes, tensors, children


INTERNALS = frozenset(vars(nn.Module())) | {"training"}


def same(one: Any, other: Any) -> bool:
    """Equality of signatures, where an integer may either be equal or follow the position."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        if len(one) != len(other):
            return False
        if len(one) == 3 and isinstance(one[0], str) and isinstance(one[1], tuple) and one[1][:1] == ("position",):
            return bool(one[0] == other[0] and (one[1] == other[1] or one[2] == other[2]))
        return all(same(a, b) for a, b in zip(one, other, strict=True))
    equal: bool = one == other
    return equal


def is_layer(module: nn.Module | None) -> bool:
    """Has submodules with parameters, and computes something itself: not a bare projection, not a list."""
    if module is None or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return False
    return any(True for child in module.children() for _ in child.parameters())


def lists(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Containers whose members may be layers, outermost first."""
    for path, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and sum(map(is_layer, module._modules.values())) > 0:
            yield path, module


def groups(container: nn.Module) -> dict[str, str]:
    """For each layer of a list that is like an earlier one, that earlier one's name."""
    like: dict[str, str] = {}
    seen: dict[int, list[tuple[str, tuple[Any, ...]]]] = {}
    for position, (name, layer) in enumerate(container._modules.items()):
        if layer is None or not is_layer(layer):
            continue
        mark = signature(layer, position)
        candidates = seen.setdefault(hash(type(layer)), [])
        for other, other_mark in candidates:
            if same(mark, other_mark):
                like[name] = other
                break
        else:
            candidates.append((name, mark))
    return like


def weightless(tensor: torch.Tensor) -> torch.Tensor:
    """A meta tensor of the same shape and dtype."""
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad and tensor.is_floating_point())
    return empty


def tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Every tensor a module owns, plain attributes included."""
    for table in (module._parameters, module._buffers, vars(module)):
        for value in table.values():
            if isinstance(value, torch.Tensor):
                yield value


def shadow(model: nn.Module, *, once: bool = True) -> Shadow:
    """The double of a model. `once=False` keeps every layer: slower, for models whose layers cannot be skipped."""
    memo: dict[int, Any] = {}
    copies: dict[str, tuple[str, ...]] = {}

    def double(module: nn.Module, path: str) -> None:
        """Fill the memo for everything below a module, innermost lists first, so that deepcopy finds it there."""
        for tensor in tensors(module):
            if id(tensor) not in memo:
                memo[id(tensor)] = weightless(tensor)
        layers = isinstance(module, (nn.ModuleList, nn.Sequential)) and once
        like = groups(module) if layers else {}
        for name, child in module._modules.items():
            if child is not None and name not in like:
                double(child, f"{path}.{name}" if path else name)
        if not like:
            return
        twin = type(module).__new__(type(module))
        twin.__dict__.update({key: value for key, value in vars(module).items() if key != "_modules"})
        outputs: dict[str, list[Any]] = {name: [] for name in like.values()}
        members: dict[str, nn.Module | None] = {}
        for name, child in module._modules.items():
            if name in like:
                members[name] = Echo(members[like[name]], outputs[like[name]])  # type: ignore[arg-type]
            else:
                members[name] = copy.deepcopy(child, memo)
                if name in outputs:
                    members[name].register_forward_hook(remember(outputs[name]))  # type: ignore[union-attr]
        twin.__dict__["_modules"] = members
        memo[id(module)] = twin
        prefix = f"{path}." if path else ""
        for representative in outputs:
            others = (prefix + name for name, other in like.items() if other == representative)
            copies[prefix + representative] = tuple(others)

    double(model, "")
    return Shadow(copy.deepcopy(model, memo).eval(), copies)


def on_shapes(run: Callable[[], T]) -> T:
    """What a run on the meta device gives. Tensors that the code makes without saying where are made there, too, if the
    run stumbles over them."""
    try:
        return run()
    except Exception as error:
        if "meta" not in str(error):
            raise
        try:
            with torch.device("meta"):
                return run()
        except Exception:
            raise error from None


def remember(place: list[Any]) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        place[:] = [output]

    return hook
