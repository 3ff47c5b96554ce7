"""Planted bugs that laws of what stays as it is must notice."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from torch import Tensor, nn

import surgery
import surgery.checkpoint.load
import surgery.graph.module
import surgery.graph.site
from tests.properties.bugs.bug import LORA, TIED, Bug, Patch, applying, drafting


def _tied_weight_split(patch: Patch) -> None:
    original = surgery.graph.module.Rewritten.build.__func__

    def build(cls: Any, root: nn.Module, *rest: Any) -> Any:
        if isinstance(root._parameters.get("weight"), nn.Parameter):
            root._parameters["weight"] = nn.Parameter(root.weight.detach().clone(), requires_grad=False)
        return original(cls, root, *rest)

    patch.setattr(surgery.graph.module.Rewritten, "build", classmethod(build))


def _base_still_trained(patch: Patch) -> None:
    original = nn.Parameter.requires_grad_
    patch.setattr(nn.Parameter, "requires_grad_", lambda self, wanted=True: original(self, True))


def _statement_not_written(patch: Patch) -> None:
    patch.setattr(surgery.graph.site.Site, "_ours", lambda self, node: node)


def _loaded_without_the_last_bit(patch: Patch) -> None:
    original = surgery.checkpoint.load.put

    def put(held: Any, tensor: Tensor) -> None:
        original(held, tensor.bfloat16().to(tensor.dtype) if tensor.is_floating_point() else tensor)

    patch.setattr(surgery.checkpoint.load, "put", put)


def _copies_share(patch: Patch) -> None:
    """A deep copy that keeps the original's trained tensors."""
    original = surgery.graph.module.Rewritten.__deepcopy__

    @functools.wraps(original)
    def deepcopy(self: Any, memo: dict[int, Any]) -> Any:
        for name, parameter in self._parameters.items():
            if name in self.added:
                memo[id(parameter)] = parameter
        return original(self, memo)

    patch.setattr(surgery.graph.module.Rewritten, "__deepcopy__", deepcopy)


def _trained_values_drawn_again(patch: Patch) -> None:
    patch.setattr(drafting, "ours", lambda standing: {})


def _norms_from_before_the_mask(patch: Patch) -> None:
    patch.setattr(applying, "restarting", lambda *_: ())


def _too_late_not_noticed(patch: Patch) -> None:
    patch.setattr(importlib.import_module("surgery.compiler.again"), "too_late", lambda *_: ())


BUGS: tuple[Bug, ...] = (
    Bug("a tied weight split", "ties", _tied_weight_split, "lora rank 2 on embed", TIED),
    Bug("the base is still trained", "frame", _base_still_trained, LORA),
    Bug("nodes do not say whose they are", "graphs", _statement_not_written, LORA),
    Bug("loaded through 16 bits", "round trip", _loaded_without_the_last_bit, LORA),
    Bug("a deep copy shares what is trained", "copies", _copies_share, LORA),
    Bug(
        "a second program draws anew what was trained",
        "again",
        _trained_values_drawn_again,
        "lora rank 2 on attn.q; lora rank 1 on attn.q as second",
    ),
    Bug(
        "norms from before a second program's mask",
        "again",
        _norms_from_before_the_mask,
        "lora rank 2 dora on attn.q; prune magnitude 50% on attn.q",
    ),
    Bug(
        "what comes too late is not noticed",
        "again",
        _too_late_not_noticed,
        "quantize base nf4; prune magnitude 50% on ffn",
    ),
)
