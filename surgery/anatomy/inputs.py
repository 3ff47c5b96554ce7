"""Example inputs for a transformers model: token ids whose dimensions are all different and at least 2.

A dimension of 1 becomes a constant in an exported graph, and equal ones could be confused.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from surgery.errors import ModelError

BATCH, LENGTH, TARGET_LENGTH = 2, 7, 5


def check_model(model: object) -> None:
    """Raises ModelError S200 for what is none."""
    if not isinstance(model, nn.Module):
        raise ModelError.of(
            "S200",
            f"not a model: {f'the class {model.__name__}' if isinstance(model, type) else type(model).__name__}",
            help="a model is a torch.nn.Module; a path is read by from_pretrained, or by the command line",
        )


def example(model: nn.Module, device: torch.device | None = None) -> dict[str, Any]:
    """Tensors for `model(**inputs)` on the model's device or another: `input_ids` (2, 7).

    `decoder_input_ids` (2, 5) where taken.

    Raises ModelError S201 when the model is not a transformers text model.
    """
    config = getattr(model, "config", None)
    taken = inspect.signature(model.forward).parameters
    if config is None or not hasattr(config, "to_dict") or "input_ids" not in taken:
        raise ModelError.of(
            "S201",
            f"no example inputs for {type(model).__name__}",
            help="give some: study(model, example_inputs=(x,)), or FILE.py:FUNCTION that returns (model, inputs)",
        )
    device = device or next((p.device for p in model.parameters()), torch.device("cpu"))
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None) or 32
    high = min(vocabulary, 32) if isinstance(vocabulary, int) else 32

    def ids(length: int) -> torch.Tensor:
        steps = torch.arange(BATCH * length, device="cpu").view(BATCH, length)
        return (steps * 5 % max(high - 3, 1) + min(2, high - 1)).to(device)

    inputs: dict[str, Any] = {"input_ids": ids(LENGTH)}
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in taken:
        inputs["decoder_input_ids"] = ids(TARGET_LENGTH)
    return inputs
