"""PEFT's IA3 as statements: `ia3 input` of modules that are feed-forward there, `ia3 output` of all others."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from torch import Tensor, nn

from surgery.checkpoint.interchange.from_lora import selector
from surgery.checkpoint.interchange.peft_files import Given, cannot
from surgery.checkpoint.interchange.peft_place import ROOT

ENDING = ".ia3_l"


def statements(given: Given, model: nn.Module) -> dict[str, dict[tuple[str, str], Tensor]]:
    """Statements with their tensors. Errors: S452 for modules that the base does not have, or other tensors."""
    modules = dict(model.named_modules())
    sides: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in given.tensors.items():
        if not (name.startswith(ROOT) and name.endswith(ENDING)):
            raise cannot(f"`{given.where}` has a tensor `{name}`, which is not of IA3", "load it with PEFT")
        path = name[len(ROOT) : -len(ENDING)]
        if path not in modules:
            raise cannot(f"the base has no module `{path}`, which the adapter is for", "is it this base's adapter?")
        side = "input" if _is_inner(given.config.get("feedforward_modules"), path) else "output"
        if tensor.dim() != 2 or tensor.shape[0 if side == "input" else 1] != 1:
            raise cannot(f"`{name}` is {' x '.join(map(str, tensor.shape))}, which is no vector of its {side}s")
        sides[side][path] = tensor.reshape(-1)
    names = [name for name, each in modules.items() if isinstance(getattr(each, "weight", None), Tensor)]
    return {
        f"ia3 {side} on {selector(list(here), names)}": {(path, f"ia3_{side}"): each for path, each in here.items()}
        for side, here in sides.items()
    }


def _is_inner(said: Any, path: str) -> bool:
    """Whether PEFT scales a module's input: a pattern, or names that end its path."""
    if isinstance(said, str):
        return re.fullmatch(said, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in said or ())
