"""A module rewritten by operations as the compiler does it, without a model around it."""

from __future__ import annotations

from typing import Any

from torch import nn

from surgery.anatomy.parts import Part
from surgery.graph.draft import Draft
from surgery.graph.module import Rewritten
from surgery.graph.site import Site


def holder(module: nn.Module) -> nn.Module:
    return nn.ModuleDict({"map": module})


def rewrite(
    module: nn.Module, *operations: Any, channels: Any = None, shape: tuple[int, int] | None = None
) -> Rewritten:
    """The module after some operations on some of its channels, as the compiler does it."""
    parent = holder(module)
    draft = Draft(module, "map", slots=[(parent, "map")])
    weight = module.weight
    shape = shape or ((weight.shape[1], weight.shape[0]) if draft.transposed else tuple(weight.shape))
    lookup = isinstance(module, nn.Embedding)
    part = Part(
        "attn.q",
        "lookup" if lookup else "projection",
        "map",
        shape=shape,
        channels=channels,
        transposed=draft.transposed,
    )
    for number, operation in enumerate(operations):
        site = Site(draft, part, str(operation), f"a{number}" if operation.verb == "lora" else None, operation.verb)
        operation.rewrite(site)
        operation.fill([site], None)
    return draft.install(parent)
