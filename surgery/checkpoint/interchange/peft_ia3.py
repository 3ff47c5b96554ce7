"""IA3 as PEFT writes it: one vector for each module, of its outputs, or of its inputs where it is feed-forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from surgery.checkpoint.interchange.peft_place import ROOT, Adapter, Place, cannot, targets


def ia3(model: nn.Module, places: Sequence[Place]) -> Adapter:
    """Learned scales; rows that no statement acts on are multiplied by one. Errors: S451."""
    tensors: dict[str, Tensor] = {}
    inner: dict[str, list[Place]] = {}
    wrapped: dict[str, list[Place]] = {}
    for place in places:
        path, key = place.part.path, f"{ROOT}{place.part.path}.ia3_l"
        wrapped.setdefault(path, []).append(place)
        if place.operation.of_input(place.part):
            inner.setdefault(path, []).append(place)
            tensors[key] = place.tensor("ia3_input").view(1, -1)
            continue
        scale = place.tensor("ia3_output")
        tensors.setdefault(key, torch.ones(place.part.shape[0], 1, dtype=scale.dtype))[place.rows, 0] = scale
    if any(0 < len(inner.get(path, ())) < len(here) for path, here in wrapped.items()):
        raise cannot("one projection has its input and its output scaled", "merge one of them")
    config = {
        "peft_type": "IA3",
        "target_modules": targets(model, wrapped),
        "feedforward_modules": targets(model, inner) if inner else [],
        "fan_in_fan_out": any(place.part.transposed for place in places),
    }
    return Adapter(config, tensors, frozenset(wrapped))
