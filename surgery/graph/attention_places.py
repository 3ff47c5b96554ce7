"""Where the queries of an attention call stand, and what follows for a prefix: windows, biases by relative position."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.graph.attention_math import prefixed_mask


def prefixed_call_mask(
    mask: Tensor | None,
    module: Any,
    query: Tensor,
    key: Tensor,
    keywords: dict[str, Any],
    positions: int,
    causal_without_mask: bool,
    windowed: bool,
) -> Tensor | None:
    """`prefixed_mask` for a call through transformers, where one query of a causal module sees every key.

    windowed: position j of the prefix is seen from place p as a token so far in front is, if p + n - j < window.
    """
    if not positions:
        return mask
    causal = _causal(module, keywords)
    window = keywords.get("sliding_window") if windowed else None
    seen = None
    if window is not None:
        distance = _distances(places(mask, query, key, causal), positions)
        seen = (distance < window)[:, None]
    widened = prefixed_mask(mask, query, key, causal_without_mask and query.shape[2] > 1 and causal, positions)
    if seen is None:
        return widened
    if widened is None:
        widened = query.new_ones((1, 1, query.shape[2], positions + key.shape[-2]), dtype=torch.bool)
    if widened.dtype == torch.bool:
        return widened & F.pad(seen, (0, key.shape[-2]), value=True)
    hidden = torch.zeros(seen.shape, dtype=widened.dtype, device=seen.device)
    hidden = hidden.masked_fill(~seen, torch.finfo(widened.dtype).min)
    return widened + F.pad(hidden, (0, key.shape[-2]))


def _causal(module: Any, keywords: dict[str, Any]) -> bool:
    causal = keywords.get("is_causal")
    return bool(getattr(module, "is_causal", True) if causal is None else causal)


def places(mask: Tensor | None, query: Tensor, key: Tensor, causal: bool) -> Tensor:
    """(batch or 1, queries): how many tokens stand before each query's, padding not counted.

    Read from the mask, which knows of padding, caches and windows: of keys that a window has left behind no more is
    known than that they are behind it.
    """
    length, keys = query.shape[-2], key.shape[-2]
    if mask is None:
        first = keys - length if length == 1 else 0
        return torch.arange(first, first + length, device=query.device)[None]
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    if causal:
        return visible[:, 0].sum(-1) - 1
    counted = visible[:, 0].expand(-1, length, -1).cumsum(-1) - 1
    return counted.diagonal(dim1=-2, dim2=-1)


def _distances(place: Tensor, positions: int) -> Tensor:
    """(batch or 1, queries, positions): how far a query stands behind each position of the prefix."""
    return place[..., None] + positions - torch.arange(positions, device=place.device)


def table_of_distances(model: nn.Module, path: str) -> tuple[Any, ...]:
    """The attention module, here or in a layer of the same stack, that holds the biases by relative position.

    A tuple, empty where there is none, so that it becomes no child of what keeps it.
    """
    holders = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "compute_bias") and "relative_attention_bias" in module._modules
    }
    others = (module for name, module in holders.items() if _same_but_for_layer(name, path))
    found = holders.get(path) or next(others, None)
    return () if found is None else (found,)


def _same_but_for_layer(one: str, other: str) -> bool:
    """Whether two paths differ in a number, of their layers, before they differ in anything else."""
    differing = (pair for pair in zip(one.split("."), other.split("."), strict=False) if pair[0] != pair[1])
    return all(word.isdigit() for word in next(differing, ("",)))


def prefixed_keywords(
    keywords: dict[str, Any], mask: Tensor | None, module: Any, query: Tensor, key: Tensor, positions: int
) -> dict[str, Any]:
    """Keywords of a call with n more keys on the left.

    A bias by relative position goes on: the prefix stands right before the first token, as far from each query as if
    it were tokens. Where the model has no table to read this from (cross-attention), the bias is zero.
    """
    bias = keywords.get("position_bias")
    if bias is None or not positions:
        return keywords
    source = module.surgery_attention.core.distances
    if not source:
        return {**keywords, "position_bias": F.pad(bias, (positions, 0))}
    place = places(mask, query, key, _causal(module, keywords)).clamp(min=0)
    keys = key.shape[-2]
    table = source[0].compute_bias(keys, positions, device=bias.device, past_seen_tokens=positions)
    columns = table[0][:, place].transpose(0, 1).to(bias.dtype)  # (batch or 1, heads, queries, positions)
    rows = max(columns.shape[0], bias.shape[0])
    both = (columns.expand(rows, -1, -1, -1), bias.expand(rows, -1, -1, -1))
    return {**keywords, "position_bias": torch.cat(both, dim=-1)}
