"""The verbs: a table from name to class, imported when used. Other packages add to it by entry points."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from surgery.errors import ProgramError

if TYPE_CHECKING:
    from surgery.operations.base import Operation

GROUP = "surgery.operations"

TABLE: Mapping[str, str] = MappingProxyType(
    {
        "quantize": "surgery.operations.quantize:Quantize",
        "lora": "surgery.operations.lora:Lora",
        "prefix": "surgery.operations.prefix:Prefix",
        "prune": "surgery.operations.prune:Prune",
    }
)


def verbs() -> dict[str, str]:
    """Every verb and where its class is, `module:Class`. Other packages add verbs; they cannot replace ours."""
    return {**_installed(), **TABLE}


def lookup(verb: str) -> type[Operation] | None:
    """The class of a verb, None when there is no such verb. Raises ProgramError (S040) when its package is broken."""
    place = TABLE.get(verb) or _installed().get(verb)  # packages are searched for what is not ours only: it takes time
    if place is None:
        return None
    module, _, name = place.partition(":")
    try:
        found: type[Operation] = getattr(importlib.import_module(module), name)
    except Exception as error:
        raise ProgramError.of(
            "S040",
            f"the verb '{verb}' cannot be loaded from {place}: {type(error).__name__}: {error}",
            help="repair or uninstall the package that provides it",
        ) from error
    return found


def _installed() -> dict[str, str]:
    from importlib.metadata import entry_points  # slow to import, and rarely needed

    return {point.name: point.value for point in sorted(entry_points(group=GROUP), key=lambda point: point.value)}
