"""What rewritten attention graphs call: keys and values put in front, masks that let them be seen, a second softmax.

Throughout, `prefix` is (key-value heads, n, width), or one such for each row of a batch; keys and values are
(batch, heads, length, width), or (batch * heads, length, width) where a model folds heads into the batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def absent() -> None:
    """A mask that is not there, as a value that graphs can name."""
    return


def like(prefix: Tensor, states: Tensor, heads: int) -> Tensor:
    """The prefix for every row of a batch, in the dtype and layout of `states`.

    heads: query heads of the call. Where a model has repeated keys and values for groups of queries already, the
    prefix is repeated too.
    """
    present = states.shape[1] if states.dim() == 4 else heads
    if present != prefix.shape[-3]:
        prefix = prefix.repeat_interleave(present // prefix.shape[-3], dim=-3)
    prefix = prefix.to(states.dtype)
    if states.dim() == 4:
        return prefix.expand(states.shape[0], -1, -1, -1)
    if prefix.dim() == 4:
        return prefix.flatten(0, 1)
    return prefix.repeat(states.shape[0] // heads, 1, 1)


def prepend(states: Tensor, prefix: Tensor, heads: int) -> Tensor:
    """[prefix; states] along the length."""
    if not prefix.shape[-2]:
        return states
    return torch.cat((like(prefix, states, heads), states), dim=-2)


def prepend_scores(scores: Tensor, prefix_scores: Tensor) -> Tensor:
    """[prefix; scores] along the keys. Masks were added to `scores` before, so the prefix is seen by every query."""
    return torch.cat((prefix_scores.to(scores.dtype), scores), dim=-1)


def prefixed_mask(mask: Tensor | None, query: Tensor, key: Tensor, causal: Any, positions: int) -> Tensor | None:
    """A mask with `positions` visible columns on its left.

    mask: (..., queries, keys), boolean (true is visible) or added to scores; None with `causal` means that query i sees
    keys 0 to i, counted from the first key whatever their number (a static cache is longer than its queries).
    """
    if not positions:
        return mask
    if mask is None:
        if not causal:
            return None
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if mask.shape[-1] != key.shape[-2]:
        mask = mask.expand(*mask.shape[:-1], key.shape[-2])
    return F.pad(mask, (positions, 0), value=True if mask.dtype == torch.bool else 0.0)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: Any = False,
    dropout: Any = 0.0,
    scale: float | None = None,
    grouped: bool = False,
) -> Tensor:
    """scaled_dot_product_attention, which takes `causal` for masks that are not given."""
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout, bool(causal) and mask is None, scale=scale, enable_gqa=grouped
    )


def gated(out: Tensor, share: Tensor, gate: Tensor, dimension: int) -> Tensor:
    """out + tanh(gate) * share, in out's dtype. gate: (heads,); `dimension` is where out has its heads."""
    factor = torch.tanh(gate).to(out.dtype)
    if out.dim() == 3:
        return out + factor.repeat(out.shape[0] // factor.shape[0])[:, None, None] * share
    return out + factor.view([-1 if each == dimension else 1 for each in range(4)]) * share


class Core(nn.Module):
    """The attention implementation that a model had, as a call in a graph.

    function: (module, query, key, value, mask, **keywords) -> (out (batch, queries, heads, width), weights or None).
    causal_without_mask: it takes a mask that is not given for a causal one, where the module is causal.
    """

    def __init__(self, function: Any, causal_without_mask: bool) -> None:
        super().__init__()
        self.function, self.causal_without_mask = function, causal_without_mask
        self.distances: tuple[Any, ...] = ()

    def forward(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, keywords: dict[str, Any]
    ) -> Any:
        return self.function(module, query, key, value, mask, **keywords)


def alone_keywords(keywords: dict[str, Any], causal_without_mask: bool) -> dict[str, Any]:
    """Keywords of a call in which every query sees every key."""
    kept = {name: value for name, value in keywords.items() if name != "position_bias"}
    return {**kept, "is_causal": False} if causal_without_mask else kept
