"""Neurons of feed-forward networks are cut out: their rows on the way up, their columns on the way down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from surgery.operations.structured import Structured


@dataclass(frozen=True, kw_only=True)
class PruneNeurons(Structured):
    """Make feed-forward networks narrower: `prune neurons 30% by magnitude on ffn`.

    A neuron is a row on the way up, its gate's row, their biases, and a column on the way down: they go together, and
    the matrices get smaller. round(share * width) neurons go, the same number in layers of the same width; of equal
    scores the ones that come first. What is left computes what the whole does with those neurons at zero. `round to 64`
    leaves a multiple of 64; a share that cannot be had so is an error that lists what can.
    """

    verb: ClassVar[str] = "prune neurons"
    unit: ClassVar[Literal["neurons"]] = "neurons"
    readers: ClassVar[tuple[str, ...]] = ("ffn.down",)
    place: ClassVar[str] = "a feed-forward network"
