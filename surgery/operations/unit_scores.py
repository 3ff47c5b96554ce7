"""What each unit of a group is worth: sums over all its rows and columns, or what it computes on texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from surgery.errors import GraphError
from surgery.graph import calibration
from surgery.graph.cutting import Cut, tensor_of
from surgery.graph.shaping import Shaping
from surgery.graph.site import seed_of
from surgery.operations.prune import all_but as all_but
from surgery.operations.prune_scores import read_texts, taylor

if TYPE_CHECKING:
    from surgery.anatomy.groups import Axis
    from surgery.operations.structured import Structured


def scores(operation: Structured, cuts: Sequence[Cut], shaping: Shaping) -> list[tuple[Tensor, Tensor]]:
    """For each cut the score of every unit, (count,), and of what key-value groups share, (groups,); float64.

    magnitude: sum |w|. sensitivity: sum |w dL/dw|, the mean over the texts. activation (Muralidharan et al. 2024): what
    reads a unit reads a; sqrt of the sum over its columns and the texts of (mean over tokens of |a|)^2.
    Errors: those of calibration; GraphError S398 for a score that is no number.
    """
    if operation.by == "random":
        found = [_drawn(cut, shaping.seed, operation.verb) for cut in cuts]
    elif operation.by == "activation":
        found = _activations(cuts, shaping, read_texts(operation, shaping.anatomy, shaping.tokenizer))
    else:
        names = list(dict.fromkeys(axis.name for cut in cuts for axis in (*cut.group.axes, *cut.group.shared)))
        tensors = {name: tensor_of(shaping.model, name) for name in names}
        if operation.by == "magnitude":
            weights = {name: tensor.detach().abs() for name, tensor in tensors.items()}
        else:
            read = read_texts(operation, shaping.anatomy, shaping.tokenizer)
            learnt = [name for name, tensor in tensors.items() if isinstance(tensor, torch.nn.Parameter)]
            means = taylor([tensors[name] for name in learnt], shaping.model, read)
            weights = dict(zip(learnt, means, strict=True))
        found = [
            (
                _summed(_once(cut.group.axes, tensors), weights, cut.group.count),
                _summed(cut.group.shared, weights, cut.group.sharing),
            )
            for cut in cuts
        ]
    for cut, pair in zip(cuts, found, strict=True):
        if not all(bool(score.isfinite().all()) for score in pair):
            raise GraphError.of("S398", f"the scores of the {cut.group.kind} at {cut.group.places[0]} are no numbers")
    return found


def _once(axes: Sequence[Axis], tensors: dict[str, Tensor]) -> list[Axis]:
    """One for each axis of a tensor, whatever its names."""
    return list({(id(tensors[axis.name]), axis.axis): axis for axis in axes}.values())


def _summed(axes: Sequence[Axis], weights: dict[str, Tensor], count: int) -> Tensor:
    total = torch.zeros(count + 1, dtype=torch.float64)  # the last one takes what belongs to none
    for axis in axes:
        if axis.name in weights:
            lines = weights[axis.name].movedim(axis.axis, 0).reshape(axis.size, -1)
            sums = lines.sum(1, dtype=torch.float64).cpu()
            total.index_add_(0, torch.tensor([unit if unit >= 0 else count for unit in axis.units]), sums)
    return total[:count]


def _drawn(cut: Cut, seed: int, verb: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed_of(seed, cut.group.places[0], verb, "score"))
    units = torch.rand(cut.group.count, generator=generator, dtype=torch.float64)
    return units, torch.zeros(cut.group.sharing, dtype=torch.float64)


def _activations(cuts: Sequence[Cut], shaping: Shaping, read: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    squares: dict[str, Tensor] = {}

    def see(path: str, x: Tensor) -> None:
        wide = x if x.dtype == torch.float64 else x.float()
        square = wide.abs().mean(0).square().double().cpu()
        squares[path] = squares[path] + square if path in squares else square

    readers = {axis.path: axis for cut in cuts for axis in cut.group.readers if axis.axis < 2}  # not experts
    with calibration.quiet(shaping.model), calibration.watched(shaping.model, list(readers), see):
        for ids in read:
            calibration.read_ids(shaping.model, ids)
    missing = [path for path in readers if path not in squares]
    if missing:
        raise GraphError.of(
            "S398", f"{missing[0]} reads nothing of the calibration set", help="leave it out with `except`"
        )
    found = []
    for cut in cuts:
        total = torch.zeros(cut.group.count, dtype=torch.float64)
        for axis in (axis for axis in cut.group.readers if axis.path in readers):
            total.index_add_(0, torch.tensor(axis.units), squares[axis.path])
        found.append((total.sqrt(), torch.zeros(cut.group.sharing, dtype=torch.float64)))
    return found
