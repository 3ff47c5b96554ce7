"""Planted bugs that laws of plans must notice."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import surgery
import surgery.graph.site
from tests.properties.bugs.bug import LORA, Bug, Patch, planning, selecting


def _last_layer_off_by_one(patch: Patch) -> None:
    original = selecting.indices

    def indices(selector: Any, depth: int) -> Any:
        moved = {
            name: value + 1 if value is not None and value < -1 else value
            for name, value in (("first", selector.first), ("last", selector.last))
        }
        return original(dataclasses.replace(selector, **moved), depth)

    patch.setattr(selecting, "indices", indices)


def _range_without_its_end(patch: Patch) -> None:
    original = selecting.indices
    patch.setattr(selecting, "indices", lambda selector, depth: list(original(selector, depth))[:-1] or [0])


def _conflicts_not_seen(patch: Patch) -> None:
    patch.setattr(planning, "conflicts", lambda steps: ())


def _one_seed_for_all(patch: Patch) -> None:
    patch.setattr(surgery.graph.site, "seed_of", lambda *words: 7)


def _seed_by_counting(patch: Patch) -> None:
    counter = iter(range(10**6))
    patch.setattr(surgery.graph.site, "seed_of", lambda *words: next(counter))


def _overlaps_counted_twice(patch: Patch) -> None:
    costing: Any = importlib.import_module("surgery.compiler.cost")
    original = costing.count
    patch.setattr(costing, "count", lambda steps, model: sum(original([step], model) for step in steps))


BUGS: tuple[Bug, ...] = (
    Bug("layer -2 off by one", "plans count", _last_layer_off_by_one, "lora rank 1 on attn.q in layers -2"),
    Bug(
        "a range of layers without its end",
        "plans count",
        _range_without_its_end,
        "lora rank 1 on attn.q in layers 0..1",
    ),
    Bug("conflicts not seen", "conflicts", _conflicts_not_seen, LORA),
    Bug("every tensor has the same seed", "seeds", _one_seed_for_all, LORA),
    Bug("seeds by counting", "order", _seed_by_counting, "lora rank 1 on attn.q; lora rank 1 on ffn.up"),
    Bug(
        "what two statements train is counted twice",
        "plans count",
        _overlaps_counted_twice,
        "train ffn; train layers -1",
    ),
)
