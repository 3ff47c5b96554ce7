"""Planted bugs that laws of what comes in front must notice."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

import surgery
import surgery.graph.attention
import surgery.graph.attention_text
import surgery.graph.entry
import surgery.graph.recurrent
import surgery.graph.soft
import surgery.graph.soft_entry
from tests.properties.bugs.bug import CAUSAL, ODD, Bug, Patch


def _prefix_without_its_mask(patch: Patch) -> None:
    def mask(mask: Tensor | None, query: Tensor, key: Tensor, causal: Any, positions: int) -> Tensor | None:
        wide = torch.ones(query.shape[-2], key.shape[-2] + positions, dtype=torch.bool).tril()
        return wide if mask is None or mask.dtype == torch.bool else None

    patch.setattr(surgery.graph.attention, "prefixed_mask", mask)


def _prefix_hidden(patch: Patch) -> None:
    original = surgery.graph.attention.prefixed_mask

    def mask(mask: Tensor | None, query: Tensor, key: Tensor, causal: Any, positions: int) -> Tensor | None:
        made = original(mask, query, key, causal, positions)
        assert made is not None
        made[..., 0] = False
        return made

    patch.setattr(surgery.graph.attention, "prefixed_mask", mask)


def _prefix_unmasks_the_future(patch: Patch) -> None:
    patch.setattr(surgery.graph.attention, "prefixed_mask", lambda *_: None)


def _prefix_behind(patch: Patch) -> None:
    from surgery.graph.attention_math import like

    def prepend(states: Tensor, prefix: Tensor, heads: int) -> Tensor:
        return torch.cat((states, like(prefix, states, heads)), dim=-2)

    patch.setattr(surgery.graph.attention, "prepend", prepend)


def _positions_not_shifted(patch: Patch) -> None:
    patch.setattr(surgery.graph.entry.Shift, "__call__", lambda self, *_: None)


def _heads_not_repeated(patch: Patch) -> None:
    """Key-value heads repeated in the wrong order: 0 1 0 1 for 0 0 1 1."""
    original = Tensor.repeat_interleave

    def like(prefix: Tensor, states: Tensor, heads: int) -> Tensor:
        wide = prefix.repeat(states.shape[1] // prefix.shape[0], 1, 1)
        return wide.to(states.dtype).expand(states.shape[0], -1, -1, -1)

    assert original is not None
    patch.setattr(surgery.graph.attention_math, "like", like)


def _prompt_read_where_its_tokens_stand(patch: Patch) -> None:
    """Positions are shifted by the prompt while it is read itself."""
    original = surgery.graph.soft.Front._set

    def shifted(self: Any, now: str | None, waiting: dict[str, int]) -> None:
        original(self, now, waiting)
        for amounts in self.amounts:
            amounts.less = 0

    patch.setattr(surgery.graph.soft.Front, "_set", shifted)


def _prompts_in_another_order(patch: Patch) -> None:
    patch.setattr(surgery.graph.soft, "order", lambda prompt: (-prompt[0], prompt[1]))


def _text_one_short(patch: Patch) -> None:
    original = surgery.graph.attention_text.token_ids
    patch.setattr(surgery.graph.attention_text, "token_ids", lambda tokenizer, text: original(tokenizer, text)[:-1])


def _kept_values_are_keys(patch: Patch) -> None:
    original = surgery.graph.soft.States.forward

    def forward(self: Any, key: Tensor, value: Tensor, *stored: Tensor) -> Any:
        found = original(self, key, value, *stored)
        return (found[0], found[0]) if stored and self.of not in self.reading.waiting else found

    patch.setattr(surgery.graph.soft.States, "forward", forward)


def _lstm_in_one_direction(patch: Patch) -> None:
    original = surgery.graph.recurrent.lstm

    def lstm(x: Tensor, hidden: int, *weights: Tensor) -> Tensor:
        return torch.cat((original(x, hidden, *weights)[:, :hidden], x.new_zeros(len(x), hidden)), 1)

    patch.setattr(surgery.graph.recurrent, "lstm", lstm)


def _network_folds_to_its_input(patch: Patch) -> None:
    original = surgery.graph.soft_entry.EntrySite.folds_to

    def folds_to(self: Any, name: str, node: Any) -> Any:
        original(self, name, node.args[0])
        return node

    patch.setattr(surgery.graph.soft_entry.EntrySite, "folds_to", folds_to)


BUGS: tuple[Bug, ...] = (
    Bug("prefix without its mask", "soft equals hard", _prefix_without_its_mask, "prefix 3 on all layers"),
    Bug("one position of the prefix hidden", "soft equals hard", _prefix_hidden, "prefix 3 on all layers"),
    Bug("the prefix unmasks later tokens", "causal", _prefix_unmasks_the_future, "prefix 3 on all layers"),
    Bug("prefix behind the keys", "soft equals hard", _prefix_behind, "prefix 3 on all layers", CAUSAL),
    Bug("a prompt read where its tokens stand", "texts", _prompt_read_where_its_tokens_stand, "prefix 3 on all layers"),
    Bug("prompts in another order", "texts", _prompts_in_another_order, "prefix 3 on all layers"),
    Bug("a text one token short", "texts", _text_one_short, "prefix 3 on all layers"),
    Bug("kept values are keys", "texts", _kept_values_are_keys, "prefix 3 on all layers"),
    Bug("an LSTM in one direction", "made prompts", _lstm_in_one_direction, "prefix 3 on all layers"),
    Bug("a network folds to its input", "made prompts", _network_folds_to_its_input, "prefix 3 on all layers"),
    Bug("positions not shifted", "soft equals hard", _positions_not_shifted, "prefix 3 on all layers"),
    Bug(
        "key-value heads repeated in the wrong order",
        "soft equals hard",
        _heads_not_repeated,
        "prefix 3 on all layers",
        dataclasses.replace(ODD, width=24, heads=4, key_value_heads=2),
    ),
)
