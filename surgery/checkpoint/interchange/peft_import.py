"""An adapter that PEFT wrote, as a program of ours on the same base: ordinary statements with PEFT's numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor, nn

from surgery.checkpoint.interchange import from_front, from_ia3, from_lora
from surgery.checkpoint.interchange.from_base import trained
from surgery.checkpoint.interchange.peft_files import Given, cannot, read
from surgery.compiler.drafts import Drafts
from surgery.compiler.plan import Plan

Model = TypeVar("Model", bound=nn.Module)
Statements = dict[str, dict[tuple[str, str], Tensor]]
"""By statement without its name, its tensors by the path and the name that a statement of ours gives them."""
READERS: Mapping[str, Callable[[Given, nn.Module], Statements]] = MappingProxyType(
    {
        "LORA": from_lora.statements,
        "IA3": from_ia3.statements,
        "PROMPT_TUNING": from_front.prompt,
        "P_TUNING": from_front.prompt,
        "PREFIX_TUNING": from_front.prefix,
    }
)


def import_peft(path: str | Path, model: Model, *, name: str | None = None) -> Model:
    """The base under the adapter of a PEFT directory; the same object comes back, transformed.

    name: what to call the adapter, `as NAME`. LoRA of Linear, Conv1D, Embedding and stacked experts: plain,
    rank-stabilised, DoRA, with patterns and biases; IA3; prompt tuning and p-tuning, whose rows PEFT keeps without the
    network that made them; prefixes. Biases and modules that were trained beside it become the base's own, with a
    `train` statement. The model is as it was after an error.
    Errors: S410 to S413 the files, S452 what says something we cannot or does not fit the base, and those of `plan`.
    """
    from surgery.compiler import apply, plan
    from surgery.language import parse

    given = read(Path(path))
    own = trained(given, model)
    found = READERS[given.method](Given(given.where, given.config, own.rest), model)
    ending = f" as {name}" if name else ""
    text = "\n".join([*(f"{words}{ending}" for words in found), *own.statements])
    made = plan(parse(text, name=str(given.where)), model)
    before = f"{name}_" if name else ""
    tensors = {
        (place, f"{before}{local}"): tensor for each in found.values() for (place, local), tensor in each.items()
    }
    _check(given, made, model, tensors)
    apply(made, model)
    with torch.no_grad():
        for (place, local), tensor in tensors.items():
            _parameter(model.get_submodule(place), local).copy_(tensor)
        for full, tensor in own.values.items():
            model.get_parameter(full).copy_(tensor)
    return model


def _check(given: Given, made: Plan, model: nn.Module, tensors: Mapping[tuple[str, str], Tensor]) -> None:
    """Errors: S452 unless the program adds exactly these tensors. Drafts are made for it and not installed."""
    drafts = Drafts(model, hollow=True, seed=0, anew=True)
    for step in made.steps:
        for part in step.parts:
            if step.operation.rewrites(part) and not step.standing:
                step.operation.rewrite(drafts.site(step, part))
    wanted: dict[tuple[str, str], Tensor] = {}
    for draft in drafts:
        site = draft.finish()
        held = {name: site._parameters.get(name) for name in site.added}
        wanted |= {(draft.path, name): tensor for name, tensor in held.items() if tensor is not None}
    for keys, what in ((wanted.keys() - tensors.keys(), "lacks"), (tensors.keys() - wanted.keys(), "has too many:")):
        if keys:
            place, local = min(keys)
            raise cannot(f"`{given.where}` {what} {local} of {place or 'the model'}", "is it this base's adapter?")
    for key, tensor in tensors.items():
        shape = wanted[key].shape
        if tensor.shape != shape:
            raise cannot(
                f"{key[1]} of {key[0] or 'the model'} is {_size(tensor.shape)}, and this base takes {_size(shape)}",
                "is it this base's adapter?",
            )


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    """A tensor that a statement added at a module: in itself, or in the child that stands for what it computes."""
    (found,) = [held._parameters[name] for held in (module, *module.children()) if name in held._parameters]
    assert found is not None
    return found


def _size(shape: torch.Size) -> str:
    return " x ".join(map(str, shape))
