"""Attention that a transformers model computes itself: reached through the cache that every such module updates.

The module keeps its class and its forward. A hook hands it a cache in front of the model's own (or of none): what is
stored there is what was stored before, and what `update` gives back has gone through a graph of ours. So caches keep
their lengths, masks are made as before, and gradient checkpointing and static caches see nothing of it.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from surgery.graph.attention_interface import CHILD, through_interface

CACHES = ("past_key_values", "layer_past", "past_key_value")
MASKS = ("attention_mask", "mask")


def through_cache(module: nn.Module) -> bool:
    """Whether the module is transformers' own, and gives its keys and values to a cache before it uses them."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    ours = type(module).__module__.startswith("transformers.") and not through_interface(module)
    stores = ours and code is not None and "update" in code.co_names and _cache_of(module) is not None
    return stores and _cuts_its_bias(module)


def _cuts_its_bias(module: nn.Module) -> bool:
    """Whether a bias for each pair of places, where there is one, is cut to the number of keys by the module itself."""
    if "position_bias" not in inspect.signature(module.forward).parameters:
        return True
    return (
        re.search(r"position_bias\s*(\[|\.size)", inspect.getsource(inspect.unwrap(type(module).forward))) is not None
    )


def _cache_of(module: nn.Module) -> str | None:
    names = inspect.signature(module.forward).parameters
    return next((name for name in CACHES if name in names), None)


def graph() -> tuple[fx.Graph, dict[str, fx.Node]]:
    """What `update` gives back, and its landmarks."""
    made = fx.Graph()
    key, value = made.placeholder("key"), made.placeholder("value")
    core = made.call_function(pair, (key, value))
    made.output(core)
    return made, {"key": key, "value": value, "core": core}


def pair(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values as a cache gives them."""
    return key, value


@dataclass(frozen=True)
class Fronting:
    """The hook: a forward pre-hook that widens the mask and puts a cache of ours in front of the one given.

    cache, mask, bias: names of the arguments, None where the module has none. hides: a boolean mask is true where a key
    is hidden. causal: no mask at all means a causal one. counts: the module tells distances by the places of its keys,
    so that the prefix must stand behind the padding of each row.
    """

    places: tuple[str, ...]
    cache: str
    mask: str | None
    bias: str | None
    hides: bool
    causal: bool
    counts: bool

    @classmethod
    def of(cls, module: nn.Module) -> Fronting:
        names = tuple(inspect.signature(module.forward).parameters)
        code = inspect.unwrap(type(module).forward).__code__
        return cls(
            places=names,
            cache=str(_cache_of(module)),
            mask=next((name for name in MASKS if name in names), None),
            bias="alibi" if "alibi" in names else None,
            hides="masked_fill" in code.co_names and "scaled_dot_product_attention" not in code.co_names,
            causal="scaled_dot_product_attention" in code.co_names,
            counts="position_bias" in names or any(_is_table(buffer) for buffer in module.buffers(recurse=False)),
        )

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        child = getattr(module, CHILD)
        positions = child.ahead - child.less
        if not positions and not child.less and not child._forward_pre_hooks:
            return None
        given = {**dict(zip(self.places, args, strict=False)), **kwargs}
        inner = given.get(self.cache)
        changed: dict[str, Any] = {}
        order = None
        if positions:
            changed = self._widened(module, given, args[0] if args else given[self.places[0]], inner, positions)
            if self.counts and self.mask in changed:
                order = behind_padding(self._visible(changed[self.mask]), positions)
                wide = order[:, None, None].expand(-1, *changed[self.mask].shape[1:])
                changed[self.mask] = changed[self.mask].expand(len(order), -1, -1, -1).gather(-1, wide)
        changed[self.cache] = _in_front_of(inner, child, order)
        kept = {name: changed.get(name, value) for name, value in given.items() if name not in self.places[: len(args)]}
        beyond = {name: value for name, value in changed.items() if name not in given}
        return tuple(changed.get(name, given[name]) for name in self.places[: len(args)]), {**kept, **beyond}

    def _widened(
        self, module: Any, given: dict[str, Any], states: Tensor, inner: Any, positions: int
    ) -> dict[str, Any]:
        """The mask, and the bias by distance, with columns for the prefix."""
        changed: dict[str, Any] = {}
        mask = given.get(self.mask) if self.mask is not None else None
        bias = given.get(self.bias) if self.bias is not None else None
        further = None
        if bias is not None:
            heads = bias.shape[:-2].numel() // states.shape[0]  # (batch * heads, 1, keys), or with the two apart
            further = distances(heads, positions, bias)
            columns = further.expand(states.shape[0], -1, -1).reshape(*bias.shape[:-1], positions)
            changed[str(self.bias)] = torch.cat((columns, bias), dim=-1)
        if mask is None and self.causal and states.shape[1] > 1:
            mask = _causal(states, inner)
        if mask is not None and self.mask is not None:
            changed[self.mask] = self._mask(module, mask, further, positions)
        return changed

    def _visible(self, mask: Tensor) -> Tensor:
        if mask.dtype == torch.bool:
            return mask ^ self.hides
        return mask > torch.finfo(mask.dtype).min / 2

    def _mask(self, module: Any, mask: Tensor, further: Tensor | None, positions: int) -> Tensor:
        if further is not None and mask.dim() == 4 and mask.shape[1] > 1:  # the bias is part of this mask already
            columns = (further * module.inv_norm_factor).to(mask.dtype)[None, :, None]
            return torch.cat((columns.expand(mask.shape[0], -1, mask.shape[2], -1), mask), dim=-1)
        if mask.dtype == torch.bool:
            return F.pad(mask, (positions, 0), value=not self.hides)
        return F.pad(mask, (positions, 0))


def _is_table(buffer: Tensor) -> bool:
    """Whether a buffer has a row for each query and a column for each key, as a mask that a module keeps."""
    return buffer.dim() == 4 and buffer.shape[-1] == buffer.shape[-2] > 1


def behind_padding(visible: Tensor, positions: int) -> Tensor:
    """(batch, n + keys): the order in which [prefix; keys] become [padding on the left; prefix; tokens].

    visible: (batch, 1, queries, n + keys).
    """
    padding = visible[:, 0, -1, positions:].int().argmax(-1, keepdim=True)
    place = torch.arange(visible.shape[-1], device=visible.device)[None]
    behind = torch.where(place < padding + positions, place - padding, place)
    return torch.where(place < padding, place + positions, behind)


def distances(heads: int, positions: int, like: Tensor) -> Tensor:
    """(heads, positions): the linear bias (Press et al. 2022) of keys that stand in front of position 0."""
    nearest = 2 ** math.floor(math.log2(heads))
    slopes = _powers(nearest)
    if nearest < heads:
        slopes += _powers(2 * nearest)[::2][: heads - nearest]
    before = torch.arange(-positions, 0, device=like.device)
    # Models make this product in bfloat16.
    return (torch.tensor(slopes, device=like.device).bfloat16()[:, None] * before).to(like.dtype)


def _powers(heads: int) -> list[float]:
    return [2.0 ** (-8.0 * (head + 1) / heads) for head in range(heads)]


def _causal(states: Tensor, inner: Any) -> Tensor:
    """The mask that sdpa makes itself when it is given none."""
    seen = 0 if inner is None else inner.get_seq_length()
    length = states.shape[1]
    return torch.ones(length, seen + length, dtype=torch.bool, device=states.device).tril(seen)[None, None]


def _in_front_of(inner: Any, child: Callable[..., Any], order: Tensor | None) -> Any:
    from transformers import EncoderDecoderCache

    return _both(inner, child) if isinstance(inner, EncoderDecoderCache) else Front(inner, child, order)


def _both(inner: Any, child: Callable[..., Any]) -> Any:
    """The pair of caches of an encoder-decoder, each with ours in front."""
    both = object.__new__(type(inner))
    both.__dict__.update(inner.__dict__)
    both.self_attention_cache = Front(inner.self_attention_cache, child)
    both.cross_attention_cache = Front(inner.cross_attention_cache, child)
    return both


class Front:
    """A cache for one call of one module: stores where the model would, and gives back more than was stored."""

    def __init__(self, inner: Any, child: Callable[..., Any], order: Tensor | None = None) -> None:
        self.inner, self.child, self.order = inner, child, order

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        """[prefix; all keys so far], [prefix; all values so far]."""
        if self.inner is not None:
            key, value = self.inner.update(key, value, *args, **kwargs)
        key, value = self.child(key, value)
        if self.order is None:
            return key, value
        return tuple(each.gather(-2, self.order[:, None, :, None].expand_as(each)) for each in (key, value))

    @property
    def layers(self) -> _Layers:
        return _Layers(self)

    def get_seq_length(self, *args: Any) -> Any:
        """Of the tokens alone, as masks and positions count them."""
        return 0 if self.inner is None else self.inner.get_seq_length(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class _Layers:
    """`cache.layers[i].keys` of a cross-attention that was computed before."""

    def __init__(self, front: Front) -> None:
        self.front = front

    def __getitem__(self, index: int) -> Any:
        stored = self.front.inner.layers[index]
        keys, values = self.front.child(stored.keys, stored.values)
        return SimpleNamespace(keys=keys, values=values)


def attach(module: nn.Module, child: nn.Module) -> None:
    """Lead what the module's cache gives through the child."""
    module.add_module(CHILD, child)
    if not any(isinstance(hook, Fronting) for hook in module._forward_pre_hooks.values()):
        module.register_forward_pre_hook(Fronting.of(module), with_kwargs=True)
