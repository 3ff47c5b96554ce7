"""PEFT's LoRA as statements: modules with one rank, scale and form share one, and layers share a pattern of paths."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from surgery.anatomy.select import compiled
from surgery.checkpoint.interchange.peft_files import Given, cannot
from surgery.checkpoint.interchange.peft_place import ROOT

OURS: Mapping[str, str] = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_embedding_A": "lora_A",
    "lora_embedding_B": "lora_B",
    "lora_magnitude_vector": "lora_magnitude",
    "lora_magnitude_vector.weight": "lora_magnitude",
    "lora_B.bias": "added_bias",
}


def statements(given: Given, model: nn.Module) -> dict[str, dict[tuple[str, str], Tensor]]:
    """Statements with their tensors. Errors: S452 for what is half, or of modules that the base does not have."""
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in given.tensors.items():
        local = next((each for each in OURS if name.endswith(f".{each}")), None)
        if local is None or not name.startswith(ROOT):
            raise cannot(f"`{given.where}` has a tensor `{name}`, which is not of a LoRA", "load it with PEFT")
        found[name[len(ROOT) : -len(local) - 1]][OURS[local]] = tensor
    groups: dict[str, dict[str, dict[tuple[str, str], Tensor]]] = defaultdict(dict)
    modules = dict(model.named_modules())
    stacks = _stacks(given, found, modules)
    for path, tensors in found.items():
        if {"lora_A", "lora_B"} - tensors.keys():
            raise cannot(f"`{path}` has half an adapter", "download or copy the directory again")
        module, parameter = stacks.get(path, (path, ""))
        if module not in modules:
            raise cannot(f"the base has no module `{module}`, which the adapter is for", "is it this base's adapter?")
        place = key = f"{module}.{parameter}" if parameter else module
        stored = modules[module]._parameters[parameter] if parameter else None
        if stored is not None and stored.dim() == 3:
            tensors = _by_expert(given, tensors, stored.shape[0], parameter)
        else:
            place = module
        rank = tensors[next(name for name in tensors if name.startswith("lora_A"))].shape[-2]
        if rank != said(given, "rank_pattern", key, given.config.get("r", 8)):
            raise cannot(f"`{place}` has rank {rank}, and the configuration says another")
        normed = "lora_magnitude" in tensors
        if stored is None and normed != bool(given.config.get("use_dora")):
            has = "has" if normed else "lacks"
            raise cannot(f"`{place}` {has} the norms of DoRA, and the configuration says otherwise")
        alpha = said(given, "alpha_pattern", key, given.config.get("lora_alpha", 8))
        bias = tensors.pop("added_bias", None)
        words = _words(given, rank, alpha, tensors, bool(parameter))
        groups[words][place] = {(module, name): tensor for name, tensor in tensors.items()}
        if bias is not None:
            factor = alpha / (math.sqrt(rank) if given.config.get("use_rslora") else rank)
            _add(groups, module, modules[module], bias * factor)
    names = [name for name, each in modules.items() if isinstance(getattr(each, "weight", None), Tensor)]
    names += [f"{module}.{parameter}" for module, parameter in stacks.values()]
    return {words.format(selector(list(here), names)): _union(here) for words, here in groups.items()}


def said(given: Given, pattern: str, path: str, default: Any) -> Any:
    """The entry of a pattern for a module: the first whose key ends its path."""
    for key, value in (given.config.get(pattern) or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", path):
            return value
    return default


def selector(paths: Sequence[str], names: Sequence[str]) -> str:
    """Globs that match these of all names and no others: one for a row of layers where that is so."""
    wanted, chosen = set(paths), []
    while wanted:
        path = min(wanted, key=lambda each: (len(each), each))
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", path)
        matched = {each for each in names if compiled(pattern).fullmatch(each)}
        if not matched <= set(paths):
            pattern, matched = path, {path}
        chosen.append(f'"{pattern}"')
        wanted -= matched
    return " + ".join(chosen)


def _words(given: Given, rank: int, alpha: Any, tensors: Mapping[str, Tensor], stacked: bool) -> str:
    config = given.config
    words = [f"lora rank {rank} alpha {_number(alpha)}"]
    words += [f"dropout {_number(100 * config['lora_dropout'])}%"] if config.get("lora_dropout") and not stacked else []
    words += ["scale rs"] if config.get("use_rslora") else []
    words += ["dora"] if "lora_magnitude" in tensors else []
    return " ".join([*words, "on {}"])


def _stacks(
    given: Given, found: Mapping[str, Mapping[str, Tensor]], modules: Mapping[str, nn.Module]
) -> dict[str, tuple[str, str]]:
    """For PEFT's name of a wrapper around parameters: the module and the parameter. The innermost is the first."""
    ends = tuple(given.config.get("target_parameters") or ())
    stacks: dict[str, tuple[str, str]] = {}
    if not ends:
        return stacks
    for path in {name.replace(".base_layer", "") for name in found} & modules.keys():
        targeted = [
            parameter
            for parameter in modules[path]._parameters
            if any(f"{path}.{parameter}".endswith(f".{end}") or f"{path}.{parameter}" == end for end in ends)
        ]
        for depth, parameter in enumerate(reversed(targeted)):
            stacks[path + depth * ".base_layer"] = path, parameter
    return stacks


def _by_expert(given: Given, tensors: Mapping[str, Tensor], count: int, parameter: str) -> dict[str, Tensor]:
    """A (experts, rank, in) and B (experts, out, rank) of what PEFT lays side by side."""
    a, b = tensors["lora_A"], tensors["lora_B"]
    if a.shape[0] % count or b.shape[-1] != a.shape[0]:
        raise cannot(f"`{given.where}` has {a.shape[0]} ranks for {count} matrices of {parameter}")
    return {
        f"lora_A_{parameter}": a.reshape(count, -1, a.shape[-1]),
        f"lora_B_{parameter}": b.reshape(b.shape[0], -1, count).permute(2, 0, 1),
    }


def _add(
    groups: dict[str, dict[str, dict[tuple[str, str], Tensor]]], path: str, module: nn.Module, bias: Tensor
) -> None:
    """A bias of the adapter's own, scaled already: one that is added where the base has none."""
    if module._parameters.get("bias") is not None:
        raise cannot(
            f"the adapter adds a bias at {path}, which has one that would have to change",
            "load and merge it with PEFT",
        )
    groups["train add on bias in {}"][path] = {(path, "added_bias"): bias}


def _union(here: Mapping[str, Mapping[tuple[str, str], Tensor]]) -> dict[tuple[str, str], Tensor]:
    return {key: tensor for tensors in here.values() for key, tensor in tensors.items()}


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))
