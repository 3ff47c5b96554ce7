"""PEFT as an oracle: its adapters on a copy of a model, filled from a seed, and the same tensors for ours."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests import zoo


@dataclass(frozen=True)
class Adapted:
    """PEFT's model, and its tensors by our names: `<path>.lora_A`, `.lora_B`, `.lora_magnitude`."""

    model: nn.Module
    tensors: dict[str, Tensor]


def linear_maps(model: nn.Module) -> list[str]:
    """Paths of every projection but the head, as PEFT's `all-linear` has them."""
    head = getattr(model, "get_output_embeddings", lambda: getattr(model, "head", None))()
    kinds = (nn.Linear,)
    if hasattr(model, "config"):
        from transformers.pytorch_utils import Conv1D

        kinds = (nn.Linear, Conv1D)
    return [name for name, module in model.named_modules() if isinstance(module, kinds) and module is not head]


def peft_lora(
    model: nn.Module, paths: list[str], *, rank: int, alpha: float, seed: int = 0, rs: bool = False, dora: bool = False
) -> Adapted:
    """LoRA by PEFT on a copy, every adapter tensor random."""
    from peft import LoraConfig, inject_adapter_in_model

    transposed = any(type(model.get_submodule(path)).__name__ == "Conv1D" for path in paths)
    configuration = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=paths, use_rslora=rs, use_dora=dora, fan_in_fan_out=transposed
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = inject_adapter_in_model(configuration, copy.deepcopy(model)).eval()
    tensors: dict[str, Tensor] = {}
    for path in paths:
        layer: Any = adapted.get_submodule(path)
        found = {"lora_A": layer.lora_A["default"].weight, "lora_B": layer.lora_B["default"].weight}
        if dora:
            found["lora_magnitude"] = layer.lora_magnitude_vector["default"].weight
        for name, tensor in found.items():
            draw = torch.randn(tensor.shape, generator=zoo.seeded(seed, f"{path}.{name}"), dtype=torch.float64)
            with torch.no_grad():
                # A magnitude is about the norm it starts as. Adapters much larger than their base would make a small
                # random model chaotic: both implementations' rounding is then far more than 1e-6 away from exact.
                scale = tensor.double() * 0.2 if name == "lora_magnitude" else 0.4 * tensor.shape[-1] ** -0.5
                shift = tensor.double() if name == "lora_magnitude" else 0.0
                tensor.copy_(shift + scale * draw)
            tensors[f"{path}.{name}"] = tensor.detach().clone()
    return Adapted(adapted, tensors)


@torch.no_grad()
def load_into(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give our model the peer's tensors; both must have exactly the same ones, of the same shapes."""
    import surgery

    ours = surgery.parameters(model)
    assert set(ours) == set(tensors)
    for name, tensor in tensors.items():
        assert ours[name].shape == tensor.shape, name
        ours[name].copy_(tensor)
