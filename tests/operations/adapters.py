"""What the tests of adapters share: a program, random numbers for what they add, and a bottleneck written out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from surgery.graph.edge import CHILD
from tests import zoo

ROW = "adapter bottleneck 3 beside ffn then b as a; adapter bottleneck 4 tanh norm after ffn as b"
EVERYWHERE = (*zoo.FAMILIES, *zoo.PLAIN)


def apply(text: str, specimen: zoo.Specimen) -> Any:
    return surgery.apply(surgery.parse(text), specimen.model, example_inputs=specimen.example)


@torch.no_grad()
def trained(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Random numbers for what the program added, as after training."""
    tensors = surgery.parameters(model)
    for name, tensor in tensors.items():
        tensor.add_((0.3 * torch.randn(tensor.shape, generator=zoo.seeded(seed, name))).to(tensor.dtype))
    return tensors


def of(tensors: dict[str, Tensor], path: str, name: str = "") -> dict[str, Tensor]:
    """The tensors of one edge under their short names."""
    start = f"{path}.{CHILD}.{name}adapter_"
    return {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}


def bottleneck(x: Tensor, w: dict[str, Tensor], f: Any = F.relu, scale: float = 1.0) -> Tensor:
    """s (W_up f(W_down x + b) + c), written out."""
    return scale * (f(x @ w["down_weight"].t() + w["down_bias"]) @ w["up_weight"].t() + w["up_bias"])
