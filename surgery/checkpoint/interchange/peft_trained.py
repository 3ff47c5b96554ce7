"""Tensors of the base that a program trains beside an adapter, as PEFT keeps them: biases, and whole modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from surgery.anatomy.tensors import NEW
from surgery.checkpoint.interchange.peft_lora import scale_at
from surgery.checkpoint.interchange.peft_place import ROOT, Adapter, cannot, place
from surgery.compiler.plan import Step
from surgery.compiler.training import tensors
from surgery.graph.module import added_parameters


def with_trained(model: nn.Module, made: Adapter, steps: Sequence[Step]) -> Adapter:
    """The adapter with what these `train` statements train. Errors: S451 where PEFT would wrap a module twice."""
    made = _with_added(model, made, steps)
    ids = tensors(steps, model)
    names = [name for name, tensor in model.named_parameters(remove_duplicate=False) if id(tensor) in ids]
    split = [(path, local) for path, _, local in (name.rpartition(".") for name in names)]
    lora = made.config["peft_type"] == "LORA"
    whole = dict.fromkeys(path for path, local in split if not (lora and "bias" in local))
    biases = [(path, local) for path, local in split if path not in whole]
    found = dict(made.tensors)
    for path in whole:
        found |= _whole(model, made, path)
    config = dict(made.config)
    if biases:
        only = all(path in made.wrapped for path, _ in biases)
        config["bias"] = "lora_only" if only else "all"
        found |= _biases(model, made, only)
    if whole:
        config["modules_to_save"] = list(whole)
    return replace(made, config=config, tensors=found)


def _biases(model: nn.Module, made: Adapter, only: bool) -> dict[str, Tensor]:
    """All that PEFT keeps of them: every bias of the modules that it wraps, or of the model."""
    ours = set(added_parameters(model))
    found = {}
    for name, tensor in model.named_parameters():
        path, _, local = name.rpartition(".")
        wrapped = path in made.wrapped
        if "bias" in local and name not in ours and (wrapped or not only):
            found[f"{ROOT}{path}.{'base_layer.' * wrapped}{local}"] = tensor.detach()
    return found


def _whole(model: nn.Module, made: Adapter, path: str) -> dict[str, Tensor]:
    """All of a module that PEFT is to keep a copy of."""
    module = model.get_submodule(path)
    others = [name for name, _ in model.named_modules() if name != path and name.endswith(path)]
    if path in made.wrapped:
        raise cannot(
            f"{path} is trained itself and has an adapter, and PEFT does one or the other", "merge the adapter"
        )
    if next(module.children(), None) is not None or others or not path:
        what = f"{others[0]} ends in its name" if others else "it holds other modules"
        raise cannot(f"{path or 'the model'} is trained, and PEFT would take more with it: {what}", "leave it out")
    root = ROOT if made.wrapped else ROOT.partition(".")[0] + "."  # what puts rows in front wraps the model once
    return {f"{root}{path}.{name}": tensor for name, tensor in module.state_dict().items()}


def _with_added(model: nn.Module, made: Adapter, steps: Sequence[Step]) -> Adapter:
    """Biases that the base does not have: PEFT puts them into B, before the scale."""
    new = [place(model, step, part) for step in steps for part in step.parts if part.role == NEW]
    if not new:
        return made
    outside = [each.part.path for each in new if f"{ROOT}{each.part.path}.lora_B.weight" not in made.tensors]
    if outside or made.config.get("use_dora"):
        raise cannot(
            f"PEFT adds biases to plain LoRA only, and {outside[0] if outside else 'this'} is none",
            "leave out `add`, or merge",
        )
    added = {each.part.path: each.tensor("added_bias") / scale_at(made, each.part.path) for each in new}
    found = dict(made.tensors)
    for path in made.wrapped:
        b = found.get(f"{ROOT}{path}.lora_B.weight")
        if b is not None:
            found[f"{ROOT}{path}.lora_B.bias"] = added.get(path, torch.zeros(b.shape[0], dtype=b.dtype))
    return replace(made, config={**made.config, "lora_bias": True}, tensors=found)
