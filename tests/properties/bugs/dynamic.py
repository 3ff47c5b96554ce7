"""Planted bugs that laws of sparse training must notice."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

import surgery
import surgery.operations.lottery
import surgery.operations.prune
import surgery.operations.sparse
import surgery.training.masks
import surgery.training.schedule
from tests.properties.bugs.bug import Bug, Patch


def _just_dropped_grow(patch: Patch) -> None:
    all_but = surgery.operations.prune.all_but

    def swapped(mask: Tensor, size: Tensor, growth: Tensor, share: float) -> Tensor:
        kept = int(mask.sum())
        count = min(round(share * kept), mask.numel() - kept)
        stays = all_but(mask.numel() - kept + count, size.masked_fill(~mask, -1))
        return stays | all_but(mask.numel() - count, growth.masked_fill(stays, -1))

    patch.setattr(surgery.operations.sparse, "swapped", swapped)


def _moments_not_cleared(patch: Patch) -> None:
    patch.setattr(surgery.training.schedule, "forget", lambda *_: None)


def _one_moment_cleared(patch: Patch) -> None:
    """Momentum alone, as peers do; the mean of squares stays."""
    original = surgery.training.schedule.forget

    def forget(optimizer: Any, weight: Tensor, keep: Tensor) -> None:
        squares = optimizer.state[weight].get("exp_avg_sq") if weight in optimizer.state else None
        held = None if squares is None else squares.clone()
        original(optimizer, weight, keep)
        if squares is not None:
            squares.copy_(held)

    patch.setattr(surgery.training.schedule, "forget", forget)


def _swap_at_the_end_too(patch: Patch) -> None:
    original = surgery.operations.sparse.Sparse.turns
    patch.setattr(
        surgery.operations.sparse.Sparse, "turns", lambda self, step, last: original(self, step, last and last + 1)
    )


def _end_one_step_early(patch: Patch) -> None:
    original = surgery.operations.sparse.Sparse.ending
    patch.setattr(surgery.operations.sparse.Sparse, "ending", lambda self, steps: original(self, steps) - 1)


def _cosine_inverted(patch: Patch) -> None:
    original = surgery.operations.sparse.Sparse.share
    patch.setattr(
        surgery.operations.sparse.Sparse,
        "share",
        lambda self, step, last: (self.swap or 0.3) - original(self, step, last),
    )


def _dense_gradient_not_asked(patch: Patch) -> None:
    patch.setattr(surgery.training.masks.MaskedWeight, "ask", lambda self, dense: None)


def _loaded_while_asking(patch: Patch) -> None:
    """The gradient of every weight is given for ever, since it was when the model was saved."""
    patch.setattr(surgery.training.masks, "close", lambda model: None)
    patch.setattr(surgery.training.schedule.Schedule, "_ask", _asks_once)


def _asks_once(self: Any) -> None:
    for work in self.works:
        for each in work.weights:
            if self.count:
                each.ask(True)


def _step_beside_the_swap(patch: Patch) -> None:
    """Gradients are left for the optimizer where the swap should take the place of its step."""
    original = surgery.training.schedule.Schedule._turn

    def turn(self: Any, work: Any) -> bool:
        held = [(each.weight, each.weight.grad) for each in work.weights]
        changed = original(self, work)
        for weight, gradient in held:
            weight.grad = gradient
        return changed

    patch.setattr(surgery.training.schedule.Schedule, "_turn", turn)


def _linear_for_cubic(patch: Patch) -> None:
    patch.setattr(surgery.operations.prune, "cubic", lambda first, last, part: first + (last - first) * part)


def _rewound_to_the_end(patch: Patch) -> None:
    """Weights are pruned and not put back."""
    patch.setattr(importlib.import_module("surgery.training.lottery"), "parameters", lambda model: {})


def _rounds_of_equal_size(patch: Patch) -> None:
    """The same share of the whole each round, for the same share of what is left."""

    def settled(self: Any, step: int) -> Any:
        amount = self.amount * step / self.rounds
        return surgery.operations.prune.Prune(score="magnitude", amount=amount, global_=self.global_)

    patch.setattr(surgery.operations.lottery.Lottery, "settled", settled)


RIGL = "sparse rigl 60% swap 50% every 2 steps on ffn"
GRADUAL = "prune magnitude 10% to 80% over 9 steps every 2 steps on ffn"
TICKET = "lottery 75% rounds 2 rewind 3 steps on ffn"


BUGS: tuple[Bug, ...] = (
    Bug("what has just gone may come back", "sparse training", _just_dropped_grow, RIGL),
    Bug("moments are not cleared", "sparse training", _moments_not_cleared, RIGL),
    Bug("momentum alone is cleared", "sparse training", _one_moment_cleared, RIGL),
    Bug("a swap at the end step", "sparse training", _swap_at_the_end_too, f"{RIGL[:-7]} until 10 steps on ffn"),
    Bug("the end one step early", "sparse training", _end_one_step_early, RIGL),
    Bug("the cosine inverted", "sparse training", _cosine_inverted, RIGL),
    Bug("no gradient of what is at zero", "sparse training", _dense_gradient_not_asked, RIGL),
    Bug("a step beside the swap", "sparse training", _step_beside_the_swap, RIGL),
    Bug("the gradient of every weight after loading", "resumed", _loaded_while_asking, RIGL),
    Bug("a share that grows by the same each time", "sparse training", _linear_for_cubic, GRADUAL),
    Bug("a ticket that is not rewound", "tickets", _rewound_to_the_end, TICKET),
    Bug("rounds that cut the same number", "tickets", _rounds_of_equal_size, TICKET),
)
