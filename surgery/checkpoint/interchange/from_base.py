"""Tensors of the base that PEFT keeps beside an adapter: those that were trained, and copies that say nothing new."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surgery.checkpoint.interchange.from_lora import selector
from surgery.checkpoint.interchange.peft_files import Given, cannot
from surgery.checkpoint.interchange.peft_place import ROOT

WRAPPER = ".base_layer."


@dataclass(frozen=True)
class Own:
    """statements: that train them. values: by full name. rest: what is the adapter's, by PEFT's names."""

    statements: Sequence[str]
    values: dict[str, Tensor]
    rest: dict[str, Tensor]


def trained(given: Given, model: nn.Module) -> Own:
    """Errors: S452 for tensors of other shapes, and those that replace the base's without having been trained."""
    base = dict(model.named_parameters(remove_duplicate=False))
    saved = tuple(given.config.get("modules_to_save") or ())
    values: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for name, tensor in given.tensors.items():
        full = _full(name, base)
        if full is None:
            rest[name] = tensor
            continue
        if tensor.shape != base[full].shape:
            sizes = (" x ".join(map(str, each.shape)) for each in (tensor, base[full]))
            raise cannot("`{}` is {}, and this base's is {}".format(name, *sizes), "is it this base's adapter?")
        path, _, local = full.rpartition(".")
        bias = "bias" in local and given.config.get("bias") not in (None, "none")
        if bias or path.endswith(saved or ("\0",)):
            values[full] = tensor
        elif not torch.equal(tensor.to(base[full].dtype), base[full].detach().cpu()):
            raise cannot(
                f"`{given.where}` replaces the base's {full}, and does not say that it was trained",
                "if the vocabulary was resized, resize the base's first",
            )
    _untied(base, values)
    names = list(dict.fromkeys(name.rpartition(".")[0] for name in base))
    biases = [name.rpartition(".")[0] for name in values if "bias" in name.rpartition(".")[2]]
    whole = dict.fromkeys(path for path in (name.rpartition(".")[0] for name in values) if path.endswith(saved))
    biases = [path for path in dict.fromkeys(biases) if path not in whole]
    told = [f"train bias in {selector(biases, names)}"] if biases else []
    told += [f"train {selector(list(whole), names)}"] if whole else []
    return Own(told, values, rest)


def _full(name: str, base: dict[str, nn.Parameter]) -> str | None:
    """The name in the base of a tensor that PEFT has under another, None of what is the adapter's."""
    for root in (ROOT, ROOT.partition(".")[0] + "."):
        full = name.removeprefix(root).replace(WRAPPER, ".")
        if name.startswith(root) and full in base:
            return full
    return None


def _untied(base: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    """Errors: S452 where one of two names for a tensor has got other values than the other."""
    for full, tensor in values.items():
        for other, held in base.items():
            same = values.get(other)
            if held is base[full] and other != full and (same is None or not torch.equal(same, tensor)):
                raise cannot(
                    f"the adapter has its own {full}, which in the base is {other} as well",
                    "load and merge it with PEFT, which unties them",
                )
