"""Putting a mixture of experts where a feed-forward block stands."""

from __future__ import annotations

import torch
from torch import nn

from surgery.anatomy.parts import Anatomy, Part
from surgery.graph.experts import STD, MixtureOfExperts, Routing, add_loss, fault_of
from surgery.graph.module import standings
from surgery.graph.shaping import Shaping
from surgery.graph.site import seed_of


def fault(part: Part, anatomy: Anatomy, model: nn.Module) -> str:
    """Why no experts can be made of a block, found on shapes alone; empty where they can."""
    inside = f"{part.path}."
    mine = [p for p in anatomy.parts if f"{p.path}.".startswith(inside) and p.kind != "edge" and p != part]
    others = sorted({p.role for p in mine if p.role.partition(".")[0] not in ("ffn", "linear")})
    if "experts" in others:
        return "it is a mixture of experts already"
    if others:
        return f"the ffn has no module of its own, {part.path} does `{others[0]}` as well"
    return fault_of(model.get_submodule(part.path), width(part, anatomy))


def width(part: Part, anatomy: Anatomy) -> int:
    """Features of the tokens that a block reads: as many as its last map gives."""
    inside = f"{part.path}."
    return next(p.width for p in anatomy.parts if p.role == "ffn.down" and f"{p.path}.".startswith(inside))


def _width_now(part: Part, anatomy: Anatomy, block: nn.Module) -> int:
    """The same of a model that may have been narrowed since it was studied."""
    sizes = {size for tensor in block.parameters() if tensor.dim() > 1 for size in tensor.shape}
    return next(size for size in (width(part, anatomy), *sorted(sizes)) if not fault_of(block, size))


def upcycle(part: Part, shaping: Shaping, routing: Routing) -> None:
    """Make copies of the block at a part the experts of a mixture, and put it wherever the block stands."""
    model, block = shaping.model, shaping.model.get_submodule(part.path)
    mixture = MixtureOfExperts(block, _width_now(part, shaping.anatomy, block), routing)
    weight = mixture.router.weight
    if not shaping.hollow and not weight.is_meta:
        drawn = torch.empty(weight.shape, dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32)
        generator = torch.Generator().manual_seed(seed_of(shaping.seed, part.path, "moe", "router"))
        weight.data.copy_(drawn.normal_(0, STD, generator=generator))
    for parent, name in standings(model)[id(block)]:
        parent._modules[name] = mixture
    shaping.moved[part.path] = f"{part.path}.experts"
    if hasattr(model, "config") and add_loss not in model._forward_hooks.values():
        model.register_forward_hook(add_loss)
