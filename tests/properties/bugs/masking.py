"""Planted bugs that laws of zeros and codes must notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import surgery
import surgery.graph.codes
import surgery.graph.site
import surgery.operations.prune
from tests.properties.bugs.bug import EVEN, Bug, Patch, planning


def _one_tie_too_many(patch: Patch) -> None:
    def largest(score: Tensor, share: float) -> Tensor:
        count = round(share * score.numel())
        return score > score.flatten().kthvalue(max(count, 1)).values

    patch.setattr(surgery.operations.prune, "largest", largest)


def _share_of_what_stays(patch: Patch) -> None:
    original = surgery.operations.prune.largest
    patch.setattr(surgery.operations.prune, "largest", lambda score, share: original(score, 1 - share))


def _smallest_stay(patch: Patch) -> None:
    original = surgery.operations.prune.largest
    patch.setattr(surgery.operations.prune, "largest", lambda score, share: original(-score, share))


def _pattern_along_the_output(patch: Patch) -> None:
    original = surgery.operations.prune.pattern
    patch.setattr(surgery.operations.prune, "pattern", lambda score, ratio: original(score.t(), ratio).t())


def _zeros_forgotten(patch: Patch) -> None:
    patch.setattr(surgery.graph.site.Site, "zero_out", lambda self, bits: None)


def _block_boundary_off_by_one(patch: Patch) -> None:
    original = surgery.graph.codes.encode

    def encode(weight: Tensor, *options: Any) -> Any:
        return original(weight.flatten().roll(1).view_as(weight), *options)

    patch.setattr(surgery.graph.codes, "encode", encode)


def _wrong_block_size(patch: Patch) -> None:
    original = surgery.graph.codes.encode
    patch.setattr(surgery.graph.codes, "encode", lambda w, form, block, double: original(w, form, 2 * block, double))


def _scale_per_matrix(patch: Patch) -> None:
    original = surgery.graph.codes.encode_8bit

    def encode_8bit(weight: Tensor) -> tuple[Tensor, Tensor]:
        codes, absmax = original(weight.reshape(1, -1))
        return codes.view_as(weight), absmax.expand(weight.shape[0])

    patch.setattr(surgery.graph.codes, "encode_8bit", encode_8bit)


def _cut_off(patch: Patch) -> None:
    patch.setattr(surgery.graph.codes, "encode_8bit", lambda weight: _steps(weight.half(), Tensor.trunc))


def _infinite_in_float16(patch: Patch) -> None:
    patch.setattr(surgery.graph.codes, "encode_8bit", lambda weight: _steps(weight.half(), Tensor.round))


def _steps(weight: Tensor, whole: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    absmax = weight.abs().amax(dim=1).float()
    scale = torch.where(absmax > 0, 127 / absmax, 0.0)
    return whole(weight * scale.unsqueeze(1)).to(torch.int8), absmax


def _quantized_before_pruned(patch: Patch) -> None:
    order = ("shrink", "quantize", "mask", "route", "attach", "train", "schedule")
    patch.setattr(planning, "PHASES", order)


BUGS: tuple[Bug, ...] = (
    Bug("`>` for `>=` at the threshold", "zeros", _one_tie_too_many, "prune magnitude 50% on ffn"),
    Bug("the share is what stays", "zeros", _share_of_what_stays, "prune magnitude 30% on ffn"),
    Bug("the smallest weights stay", "zeros", _smallest_stay, "prune magnitude 50% on ffn"),
    Bug("pattern along the wrong axis", "zeros", _pattern_along_the_output, "prune magnitude 1:2 on ffn", EVEN),
    Bug("pruned weights are not zeroed", "zeros", _zeros_forgotten, "prune magnitude 50% on ffn"),
    Bug("block boundary off by one", "codes", _block_boundary_off_by_one, "quantize base nf4"),
    Bug("block size doubled", "codes", _wrong_block_size, "quantize base nf4"),
    Bug("one 8-bit scale for a matrix", "codes", _scale_per_matrix, "quantize base int8"),
    Bug("8-bit codes cut off, not rounded", "codes", _cut_off, "quantize base int8"),
    Bug("8-bit scales infinite beyond float16", "codes", _infinite_in_float16, "quantize base int8"),
    Bug(
        "quantized before it is pruned",
        "codes",
        _quantized_before_pruned,
        "quantize base nf4; prune magnitude 50% on ffn",
    ),
)
