"""Planted bugs that laws of layers and experts must notice."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import surgery
import surgery.graph.depth
import surgery.graph.experts
from tests.properties.bugs.bug import Bug, Patch


def _copies_share_their_tensors(patch: Patch) -> None:
    patch.setattr(surgery.graph.depth, "copy", SimpleNamespace(deepcopy=lambda layer, memo: layer))


def _copies_are_loud(patch: Patch) -> None:
    patch.setattr(surgery.graph.depth, "zero_rows", lambda module, part: None)
    patch.setattr(surgery.graph.depth, "check_silent", lambda paths, shaping: None)


def _one_layer_too_many_dropped(patch: Patch) -> None:
    original = surgery.graph.depth.reorder
    patch.setattr(surgery.graph.depth, "reorder", lambda shaping, stack, order: original(shaping, stack, order[:-1]))


def _shares_of_all_experts(patch: Patch) -> None:
    """The weights of the chosen experts are not divided by their sum."""

    def route(self: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
        shares = torch.softmax(self.router(tokens), dim=-1)
        self.loss = None
        top, chosen = shares.topk(self.routing.top, dim=-1)
        return top, chosen

    patch.setattr(surgery.graph.experts.MixtureOfExperts, "route", route)


def _tokens_come_back_in_another_order(patch: Patch) -> None:
    original = surgery.graph.experts.MixtureOfExperts._sorted
    patch.setattr(
        surgery.graph.experts.MixtureOfExperts, "_sorted", lambda self, *args: original(self, *args).roll(1, 0)
    )


def _balance_inverted(patch: Patch) -> None:
    original = surgery.graph.experts.MixtureOfExperts._loss
    patch.setattr(surgery.graph.experts.MixtureOfExperts, "_loss", lambda self, *args: -original(self, *args))


BUGS: tuple[Bug, ...] = (
    Bug(
        "copies of layers share their tensors",
        "layers",
        _copies_share_their_tensors,
        "repeat layers 1 ; lora rank 1 on attn.q",
    ),
    Bug("silent copies are not silent", "layers", _copies_are_loud, "repeat layers 1 silent ; lora rank 1 on attn.q"),
    Bug(
        "one layer too many is dropped", "layers", _one_layer_too_many_dropped, "drop layers 0 ; lora rank 1 on attn.q"
    ),
    Bug("experts' weights do not sum to one", "experts", _shares_of_all_experts, "moe 4 experts top 2 on ffn"),
    Bug(
        "tokens come back to another place", "experts", _tokens_come_back_in_another_order, "moe 3 experts top 1 on ffn"
    ),
    Bug("the balancing loss is inverted", "experts", _balance_inverted, "moe 4 experts top 2 balance 0.5 on ffn"),
)
