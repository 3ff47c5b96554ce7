"""Statements that change the model itself, before all others, which are planned on a double that has changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from surgery.anatomy import study
from surgery.anatomy.parts import Anatomy
from surgery.anatomy.shadow import shadow
from surgery.compiler.warnings import warnings
from surgery.errors import ModelError, PlanError
from surgery.graph.attention_calls import observed
from surgery.graph.configuration import fit
from surgery.graph.shaping import Shaping

if TYPE_CHECKING:
    from torch import nn

    from surgery.compiler.plan import Step


@dataclass(frozen=True)
class Reshaped:
    """The model as the other statements will find it: a double without weights, and its anatomy.

    changed: bytes that each step adds. told: what a plan's reader should know of the steps. loaded: by what.
    """

    model: nn.Module
    anatomy: Anatomy
    changed: tuple[int, ...]
    told: tuple[str, ...]
    loaded: tuple[str, ...]


def double(
    steps: Sequence[Step],
    model: nn.Module,
    anatomy: Anatomy,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None,
) -> Reshaped:
    """Do the steps on a double of the model, which stays as it is.

    Errors: those of the steps; PlanError S132 where the model cannot run without what they take.
    """
    told = warnings(steps, anatomy, model)
    shape = shadow(model, once=False).module.train(model.training)
    sizes = [size_of(shape)]
    shaping = Shaping(shape, anatomy, hollow=True)
    for step in steps:
        step.operation.reshape(step.parts, shaping)
        sizes.append(size_of(shape))
    loaded = _loaded(settle(shaping), shaping)
    try:
        found = observed(study(shape, example_inputs), shape, example_inputs)
    except ModelError as error:
        (first, *_) = error.diagnostics
        raise PlanError.of(
            "S132",
            f"the model cannot run after `{steps[-1].statement}`: {first.message}",
            steps[-1].statement.span,
            help="leave other layers or parts",
        ) from error
    changed = tuple(after - before for before, after in pairwise(sizes))
    return Reshaped(shape, found, changed, told, loaded)


def _loaded(said: str, shaping: Shaping) -> tuple[str, ...]:
    """What builds the new shape of a transformers model from a directory, in a sentence."""
    if not hasattr(getattr(shaping.model, "config", None), "to_dict"):
        return ()
    if said == "config":
        return ("`from_pretrained` builds the new shape: the configuration says it",)
    because = "; ".join(dict.fromkeys(shaping.beyond)) or "no choice of its numbers does"
    return (f"`surgery.load` builds the new shape: the configuration cannot say it ({because})",)


def reshape(steps: Sequence[Step], shaping: Shaping) -> str:
    """Do the steps on the model itself; how a loader comes by the shape, see `Record.shape`."""
    for step in steps:
        step.operation.reshape(step.parts, shaping)
    said = settle(shaping)
    for action in () if shaping.hollow else shaping.last:
        action(shaping)
    return said


def settle(shaping: Shaping) -> str:
    """Let the configuration say what has changed: `config` where it does, else `replay`."""
    for stack in shaping.anatomy.stacks:
        if stack.name in shaping.layers:
            kept = shaping.order(stack)
            shaping.resized(stack.depth, len(kept), kept)
    said = fit(shaping.model, shaping.changes)
    return "config" if said and not shaping.beyond else "replay"


def size_of(model: nn.Module) -> int:
    """Bytes of all tensors, each once."""
    held = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in held.values())
