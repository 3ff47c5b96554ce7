"""A LoRA that PEFT wrote, as a program of ours on the same base: ordinary statements, with PEFT's numbers in them."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from surgery.anatomy.select import compiled
from surgery.checkpoint import tensors as files
from surgery.checkpoint.header import read_header
from surgery.checkpoint.interchange.peft import ROOT
from surgery.errors import CheckpointError

Model = TypeVar("Model", bound=nn.Module)
OURS = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_embedding_A": "lora_A",
    "lora_embedding_B": "lora_B",
    "lora_magnitude_vector": "lora_magnitude",
}
# Options of PEFT that change what is computed, and the values at which they do not.
SILENT: Mapping[str, tuple[Any, ...]] = {
    "bias": (None, "none"),
    "modules_to_save": (None, []),
    "lora_bias": (None, False),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
}


def import_peft(path: str | Path, model: Model, *, name: str | None = None) -> Model:
    """The base under the LoRA of a PEFT directory; the same object comes back, transformed.

    name: what to call the adapter, `as NAME`. Plain, rank-stabilised and DoRA, of Linear, Conv1D and Embedding, with
    rank and alpha patterns.
    Errors: S410 to S413 the files, S452 what is not a LoRA of PEFT or says what we cannot, and those of `apply`.
    """
    from surgery.compiler import apply, parameters
    from surgery.language import parse

    directory = Path(path)
    config = _config(directory)
    found = _tensors(directory)
    text = program(config, found, model, name)
    apply(parse(text, name=str(directory)), model)
    ours, before = parameters(model), f"{name}_" if name else ""
    with torch.no_grad():
        for module, tensors in found.items():
            for local, tensor in tensors.items():
                ours[f"{module}.{before}{OURS[local]}"].copy_(tensor)
    return model


def program(
    config: Mapping[str, Any], found: Mapping[str, Mapping[str, Tensor]], model: nn.Module, name: str | None = None
) -> str:
    """The statements that say what the directory says. Error: S452 for places that the base does not have."""
    modules = dict(model.named_modules())
    missing = sorted(set(found) - set(modules))
    if missing:
        raise _cannot(f"the base has no module `{missing[0]}`, which the adapter is for", "is it this base's adapter?")
    groups: dict[str, list[str]] = defaultdict(list)
    for path, tensors in found.items():
        a = tensors.get("lora_A.weight", tensors.get("lora_embedding_A"))
        if a is None or not {"lora_B.weight", "lora_embedding_B"} & tensors.keys():
            raise _cannot(f"`{path}` has half an adapter", "download or copy the directory again")
        rank, alpha = a.shape[0], _said(config, "alpha_pattern", path, config.get("lora_alpha", 8))
        if rank != _said(config, "rank_pattern", path, config.get("r", 8)):
            raise _cannot(f"`{path}` has rank {rank}, and the configuration says another", "")
        words = [f"lora rank {rank} alpha {_number(alpha)}"]
        words += [f"dropout {_number(100 * config['lora_dropout'])}%"] if config.get("lora_dropout") else []
        words += ["scale rs"] if config.get("use_rslora") else []
        words += ["dora"] if "lora_magnitude_vector" in tensors else []
        groups[" ".join(words)].append(path)
    ending = f" as {name}" if name else ""
    return "\n".join(f"{words} on {_selector(paths, modules)}{ending}" for words, paths in groups.items())


def _selector(paths: Sequence[str], modules: Mapping[str, nn.Module]) -> str:
    """Globs that match these modules and no others: one for a row of layers where that is so."""
    wanted, chosen = set(paths), []
    weighted = [path for path, module in modules.items() if isinstance(getattr(module, "weight", None), Tensor)]
    while wanted:
        path = min(wanted, key=lambda each: (len(each), each))
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", path)
        matched = {each for each in weighted if compiled(pattern).fullmatch(each)}
        if not matched <= set(paths):
            pattern, matched = path, {path}
        chosen.append(f'"{pattern}"')
        wanted -= matched
    return " + ".join(chosen)


def _config(directory: Path) -> Mapping[str, Any]:
    path = directory / "adapter_config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise _cannot(f"`{path}` cannot be read: {error.strerror or error}", "a directory that PEFT wrote") from None
    except (ValueError, RecursionError) as error:
        raise _cannot(f"`{path}` is not JSON ({error})") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise _cannot(f"`{path}` is of type {kind}, and only LORA is read", "load it with PEFT")
    for option, silent in SILENT.items():
        if config.get(option) not in silent:
            raise _cannot(f"`{path}` has `{option}`, which no statement of ours says", "load and merge it with PEFT")
    return config


def _tensors(directory: Path) -> dict[str, dict[str, Tensor]]:
    """Tensors by module and by their name there. Error: S452 for a name that is not of a LoRA."""
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in files.read(read_header(directory / "adapter_model.safetensors")):
        if name.endswith(".base_layer.weight"):
            continue  # an embedding's own table, which PEFT saves beside its adapter
        local = next((each for each in OURS if name.endswith(f".{each}")), None)
        if local is None or not name.startswith(ROOT):
            raise _cannot(f"`{directory}` has a tensor `{name}`, which is not of a LoRA", "load it with PEFT")
        found[name[len(ROOT) : -len(local) - 1]][local] = tensor
    return found


def _said(config: Mapping[str, Any], pattern: str, path: str, default: Any) -> Any:
    """The entry of a pattern for a module: the first whose key ends its path."""
    for key, value in (config.get(pattern) or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", path):
            return value
    return default


def _number(value: float) -> str:
    return str(int(value)) if math.isclose(value, round(value), rel_tol=0, abs_tol=0) else repr(float(value))


def _cannot(what: str, help: str = "") -> CheckpointError:
    return CheckpointError.of("S452", what, help=help)
