"""Planted bugs that laws of cut units must notice."""

from __future__ import annotations

import dataclasses
from typing import Any

import surgery.anatomy.norms
import surgery.graph.cutting
import surgery.operations.structured
import surgery.operations.unit_scores
from surgery.anatomy.groups import Axis
from surgery.operations.prune_heads import PruneHeads
from surgery.operations.structured import Structured
from tests.properties.bugs.bug import FUSED, ODD, TIED, Bug, Patch

GROUPED = dataclasses.replace(ODD, width=24, heads=6, key_value_heads=3)


def _unchecked(patch: Patch) -> None:
    """What is left is not compared with the masked whole at once."""

    def cut(model: Any, cuts: Any, inputs: Any = None, *, check: bool = True) -> None:
        surgery.graph.cutting.narrow(model, cuts)

    patch.setattr(surgery.graph.cutting, "cut", cut)


def _one_unit_too_many(patch: Patch) -> None:
    original = Structured.count_left
    patch.setattr(Structured, "count_left", lambda *args, **said: max(1, original(*args, **said) - 1))


def _largest_go(patch: Patch) -> None:
    original = surgery.operations.unit_scores.all_but
    patch.setattr(surgery.operations.unit_scores, "all_but", lambda count, scores: original(count, -scores))


def _biases_do_not_count(patch: Patch) -> None:
    original: Any = surgery.operations.unit_scores._summed
    patch.setattr(
        surgery.operations.unit_scores,
        "_summed",
        lambda axes, *args: original([axis for axis in axes if axis.parameter != "bias"], *args),
    )


def _ties_count_twice(patch: Patch) -> None:
    patch.setattr(surgery.operations.unit_scores, "_once", lambda axes, tensors: axes)


def _other_rows_stay(patch: Patch) -> None:
    original = Axis.staying

    def staying(self: Axis, units: Any) -> list[int]:
        found = original(self, units)
        return [(index + 1) % self.size for index in found] if self.parameter == "weight" and self.axis == 0 else found

    patch.setattr(Axis, "staying", staying)
    _unchecked(patch)


def _gains_upside_down(patch: Patch) -> None:
    original = surgery.anatomy.norms.rescaled
    patch.setattr(surgery.graph.cutting, "rescaled", lambda module, norm, ratio: original(module, norm, 1 / ratio))
    _unchecked(patch)


def _norms_are_left_alone(patch: Patch) -> None:
    patch.setattr(surgery.graph.cutting, "rescaled", lambda module, norm, ratio: None)
    _unchecked(patch)


def _groups_share_nothing(patch: Patch) -> None:
    """Whole groups are chosen by their query heads alone, not by their keys and values."""
    original = PruneHeads.best
    patch.setattr(PruneHeads, "best", lambda self, cut, units, shared: original(self, cut, units, 0 * shared))


BUGS: tuple[Bug, ...] = (
    Bug("one neuron too many is cut", "neurons", _one_unit_too_many, "prune neurons 30% on ffn"),
    Bug("the largest neurons go", "neurons", _largest_go, "prune neurons 30% on ffn"),
    Bug("biases do not count in a neuron's score", "neurons", _biases_do_not_count, "prune neurons 50% on ffn"),
    Bug("rows beside those that stay are kept", "neurons", _other_rows_stay, "prune neurons 30% on ffn", FUSED),
    Bug(
        "keys and values do not count among heads",
        "heads",
        _groups_share_nothing,
        "prune heads 33% nearest on attn",
        GROUPED,
    ),
    Bug("a tied table counts twice in a channel's score", "channels", _ties_count_twice, "prune channels 50%", TIED),
    Bug("gains are divided instead of multiplied", "channels", _gains_upside_down, "prune channels 50%"),
    Bug("norms of fewer channels keep their gains", "channels", _norms_are_left_alone, "prune channels 50%"),
)
