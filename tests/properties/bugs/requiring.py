"""Planted bugs that laws of requirements must notice."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

import surgery
import surgery.compiler.required
import surgery.graph.perplexity
import surgery.operations.options
from tests.properties.bugs.bug import Bug, Patch
from tests.properties.laws.requiring import HELD_OUT


def _bounds_are_outside(patch: Patch) -> None:
    original = surgery.operations.options.Comparison.holds

    def holds(self: Any, found: float, base: float | None = None) -> bool:
        return original(self, found, base) and found != self.limit(base)

    patch.setattr(surgery.operations.options.Comparison, "holds", holds)


def _tokens_see_themselves(patch: Patch) -> None:
    def loss(logits: Tensor, ids: Tensor) -> tuple[float, int]:
        losses = F.cross_entropy(logits, ids[0], reduction="none")
        return float(losses.sum()), len(losses)

    patch.setattr(surgery.graph.perplexity, "_loss", loss)


def _refused_and_changed(patch: Patch) -> None:
    patch.setattr(surgery.compiler.required, "_changed", lambda plan, model: [])


BUGS: tuple[Bug, ...] = (
    Bug(
        "at the bound is over it",
        "required",
        _bounds_are_outside,
        "train norm ; prune random 37% on ffn.down ; require size <= 1 kB",
    ),
    Bug(
        "each token is given its own probability",
        "required",
        _tokens_see_themselves,
        f'prune random 37% on ffn.down ; require perplexity < 1 using "{HELD_OUT}"',
    ),
    Bug(
        "a result that is refused stays changed",
        "required",
        _refused_and_changed,
        "prune random 37% global on ffn.down + attn.o ; require zeros < 1% on ffn.down + attn.o",
    ),
)
