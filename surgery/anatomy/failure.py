"""What to say when a model cannot be exported: which module, which line."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch
from torch import nn

from surgery.errors import ModelError

TORCH = str(Path(torch.__file__).parent)


def failure(model: nn.Module, error: BaseException) -> ModelError:
    """The error S202 for an exception inside export, naming the innermost module and line of the model's code."""
    frames = [
        frame for frame in traceback.walk_tb(error.__traceback__) if not frame[0].f_code.co_filename.startswith(TORCH)
    ]
    place, module = "", type(model).__name__
    for frame, line in frames:
        holder = frame.f_locals.get("self")
        if isinstance(holder, nn.Module) and frame.f_code.co_filename != __file__:
            module = type(holder).__name__
            place = f"{frame.f_code.co_filename}:{line}"
    first = str(error).strip().split("\n")[0] or type(error).__name__
    return ModelError.of(
        "S202",
        f"{type(model).__name__} cannot be exported" + (f": {module}, {place}" if place else f" ({module})"),
        label=f"torch.export says: {first[:300]}",
        help="give example inputs that fit, and let no branch depend on the values of tensors",
    )
