"""Planted bugs that laws of what is trained must notice."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import surgery
import surgery.graph.functions
import surgery.operations.freeze
import surgery.operations.subnetwork
import surgery.training.optimizer
import surgery.training.pages
from tests.properties.bugs.bug import LORA, Bug, Patch, applying


def _backward_without_scale(patch: Patch) -> None:
    original = surgery.graph.functions.LowRankLinear.forward

    def forward(ctx: Any, *args: Any) -> Tensor:
        y: Tensor = original(ctx, *args)
        ctx.scale = 1.0
        return y

    patch.setattr(surgery.graph.functions.LowRankLinear, "forward", staticmethod(forward))


def _backward_in_place(patch: Patch) -> None:
    """The backward pass scales the parameter itself."""
    original = surgery.graph.functions.LowRankLinear.backward

    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.saved_tensors[3].data.mul_(ctx.scale)
        return original(ctx, *gradients)

    patch.setattr(surgery.graph.functions.LowRankLinear, "backward", staticmethod(backward))


def _freeze_forgotten(patch: Patch) -> None:
    patch.setattr(surgery.operations.freeze.Freeze, "freezes", False)


def _whole_modules_trained(patch: Patch) -> None:
    """The weight beside a bias, the bias beside a weight."""

    def declare(plan: Any, model: nn.Module) -> None:
        for step in plan.steps:
            for part in step.parts:
                if step.operation.trains(part):
                    model.get_submodule(part.path).requires_grad_(True)

    patch.setattr(applying, "declare", declare)


def _trained_weight_without_its_mask(patch: Patch) -> None:
    patch.setattr(surgery.graph.functions, "masked", lambda weight, bits: weight)
    patch.setattr(surgery.operations.subnetwork.functions, "masked", lambda weight, bits: weight)


def _state_that_does_not_start_at_zero(patch: Patch) -> None:
    original = surgery.training.pages.Pages.zeros
    patch.setattr(surgery.training.pages.Pages, "zeros", lambda self, *args: original(self, *args).fill_(0.01))


def _vectors_left_out(patch: Patch) -> None:
    original = surgery.training.optimizer.groups
    patch.setattr(
        surgery.training.optimizer,
        "groups",
        lambda operation, tensors: original(operation, [tensor for tensor in tensors if tensor.dim() > 1]),
    )


BUGS: tuple[Bug, ...] = (
    Bug("scale missing in the backward pass", "gradients", _backward_without_scale, LORA),
    Bug("the backward pass writes to a parameter", "gradients", _backward_in_place, LORA),
    Bug("`freeze` freezes nothing", "trained", _freeze_forgotten, "train all layers; freeze ffn"),
    Bug("`train bias` trains the weights as well", "trained", _whole_modules_trained, "train bias"),
    Bug(
        "a trained weight forgets its mask",
        "trained",
        _trained_weight_without_its_mask,
        "train ffn; prune magnitude 50% on ffn",
    ),
    Bug(
        "paged state does not start at zero",
        "optimizer",
        _state_that_does_not_start_at_zero,
        "train ffn; optimize adamw paged lr 0.01",
    ),
    Bug("the optimizer leaves vectors out", "optimizer", _vectors_left_out, "train ffn; optimize adamw lr 0.01"),
)
