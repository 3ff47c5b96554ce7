"""How many numbers of a weight are zero, as it lies there or as its codes say."""

from __future__ import annotations

import torch
from torch import nn

from surgery.anatomy.parts import Part
from surgery.graph.draft import Draft


def count(model: nn.Module, part: Part) -> tuple[int, int]:
    """Zeros of a projection's or lookup's weight, and all of its numbers; of a fused one, of the rows of the part."""
    module = model.get_submodule(part.path)
    held = module._parameters.get(part.parameter)
    if held is not None and held.is_floating_point():
        weight = held.detach().t() if part.transposed else held.detach()
    else:
        draft = Draft(module, part.path, part.parameter)
        weight = draft.evaluate(draft.captured.weight).detach()
    if part.channels is not None:
        weight = torch.cat([weight[start:stop] for start, stop in part.channels])
    return int((weight == 0).sum()), weight.numel()
