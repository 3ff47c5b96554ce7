"""Channels of the residual stream: what belongs to each, and the whole model with those at zero that another lacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.reference_decoder import ReferenceDecoder


def weights_by_channel(model: ReferenceDecoder, of: Mapping[str, Tensor]) -> Tensor:
    """Sums over all that belongs to each channel, written out: `of` is one tensor for each parameter."""
    found = of["embed.weight"].sum(0) + of["norm.weight"]
    found = found + (0 if model.shape.tied else of["head.weight"].sum(0))
    found = found + (0 if model.position is None else of["position.weight"].sum(0))
    for index in range(len(model.layers)):
        mine = {name.removeprefix(f"layers.{index}."): each for name, each in of.items() if f"layers.{index}." in name}
        for name, tensor in mine.items():
            writes = name.startswith(("attention.o.", "ffn.down."))
            if "norm" in name or (writes and name.endswith("bias")):
                found = found + tensor
            elif not name.endswith("bias"):
                found = found + (tensor.sum(1) if writes else tensor.sum(0))
    return found


def magnitudes(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().abs() for name, parameter in model.named_parameters()}


@torch.no_grad()
def mask(whole: nn.Module, small: nn.Module) -> list[int]:
    """Zero what a narrower model has not; of the embedding, which was not rescaled, it is seen which channels stay."""
    path = next(path for path, module in whole.named_modules() if isinstance(module, nn.Embedding))
    wide, narrow = whole.get_submodule(path).weight, small.get_submodule(path).weight  # type: ignore[union-attr]
    kept = [next(i for i in range(wide.shape[1]) if torch.equal(wide[:, i], column)) for column in narrow.t()]
    gone = sorted({*range(wide.shape[1])} - {*kept})
    assert kept == sorted(kept)
    left = dict(small.named_parameters())
    for name, parameter in whole.named_parameters():
        for axis, (before, now) in enumerate(zip(parameter.shape, left[name].shape, strict=True)):
            if before != now:
                assert (before, now) == (wide.shape[1], len(kept))
                parameter.index_fill_(axis, torch.tensor(gone), 0)
    return kept


def look_at(whole: nn.Module, small: nn.Module, kept: list[int]) -> None:
    """Let LayerNorms take mean and variance of these channels alone, with the gain and eps that they have now."""

    def hook(now: Any) -> Any:
        def instead(module: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
            found, gain = torch.zeros_like(args[0]), now.weight.to(args[0].dtype)
            found[..., kept] = F.layer_norm(args[0][..., kept], (len(kept),), gain, module.bias[kept], now.eps)
            return found

        return instead

    for path, module in whole.named_modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(hook(small.get_submodule(path)))
