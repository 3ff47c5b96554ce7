"""The verbs: a table from name to class, imported when used. Other packages add to it by entry points.

A verb may have two words, `prune neurons`: then it is another one than its first word, with options of its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING

from surgery.errors import ProgramError

if TYPE_CHECKING:
    from surgery.operations.base import Operation

GROUP = "surgery.operations"

TABLE: Mapping[str, str] = MappingProxyType(
    {
        "adapter": "surgery.operations.adapter:Adapter",
        "drop": "surgery.operations.drop:Drop",
        "quantize": "surgery.operations.quantize:Quantize",
        "freeze": "surgery.operations.freeze:Freeze",
        "ia3": "surgery.operations.ia3:Ia3",
        "instruct": "surgery.operations.instruct:Instruct",
        "lora": "surgery.operations.lora:Lora",
        "moe": "surgery.operations.moe:Moe",
        "optimize": "surgery.operations.optimize:Optimize",
        "prefix": "surgery.operations.prefix:Prefix",
        "lottery": "surgery.operations.lottery:Lottery",
        "prompt": "surgery.operations.prompt:Prompt",
        "prune": "surgery.operations.prune:Prune",
        "prune channels": "surgery.operations.prune_channels:PruneChannels",
        "prune heads": "surgery.operations.prune_heads:PruneHeads",
        "prune neurons": "surgery.operations.prune_neurons:PruneNeurons",
        "ptuning": "surgery.operations.ptuning:Ptuning",
        "repeat": "surgery.operations.repeat:Repeat",
        "sparse": "surgery.operations.sparse:Sparse",
        "train": "surgery.operations.train:Train",
        "require perplexity": "surgery.operations.require:RequirePerplexity",
        "require size": "surgery.operations.require:RequireSize",
        "require trainable": "surgery.operations.require:RequireTrainable",
        "require zeros": "surgery.operations.require:RequireZeros",
        "shots": "surgery.operations.shots:Shots",
    }
)


class Vocabulary:
    """The verbs as they are now. Searching the installed packages takes time: once, and only for a verb not ours."""

    @cached_property
    def installed(self) -> Mapping[str, str]:
        from importlib.metadata import entry_points  # slow to import as well

        return {point.name: point.value for point in sorted(entry_points(group=GROUP), key=lambda point: point.value)}

    def verbs(self) -> dict[str, str]:
        """Every verb and where its class is, `module:Class`. Other packages add verbs; they cannot replace ours."""
        return {**self.installed, **TABLE}

    def longer(self, verb: str) -> list[str]:
        """The verbs of two words whose first one this is."""
        known = TABLE if verb in TABLE else self.verbs()
        return sorted(name for name in known if name.startswith(f"{verb} "))

    def lookup(self, verb: str) -> type[Operation] | None:
        """The class of a verb, None when there is no such verb. Raises ProgramError (S040): its package is broken."""
        place = TABLE.get(verb) or self.installed.get(verb)
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


def verbs() -> dict[str, str]:
    """Every verb and where its class is, `module:Class`."""
    return Vocabulary().verbs()


def lookup(verb: str) -> type[Operation] | None:
    """The class of a verb, None when there is no such verb. Raises ProgramError (S040): its package is broken."""
    return Vocabulary().lookup(verb)
