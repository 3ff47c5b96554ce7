"""How many numbers of a weight are zero, as it lies there or as its codes say."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from surgery.anatomy.parts import Part
from surgery.graph.draft import Draft


def count(model: nn.Module, part: Part) -> tuple[int, int]:
    """Zeros of a projection's or lookup's weight, and all of its numbers; of a fused one, of the rows of the part."""
    weight = weight_of(model, part)
    return int((weight == 0).sum()), weight.numel()


def weight_of(model: nn.Module, part: Part) -> Tensor:
    """(rows of the part, in), without what is attached."""
    module = model.get_submodule(part.path)
    held = module._parameters.get(part.parameter)
    if held is not None and held.is_floating_point():
        return rows(part, held.detach())
    draft = Draft(module, part.path, part.parameter)
    return rows(part, draft.evaluate(draft.captured.weight).detach(), stored=False)


def rows(part: Part, weight: Tensor, stored: bool = True) -> Tensor:
    """The rows of a part. stored: the weight lies as its module has it, else it is (out, in)."""
    wide = weight.t() if stored and part.transposed else weight
    return wide if part.channels is None else torch.cat([wide[start:stop] for start, stop in part.channels])
