"""Norms that look at some of the channels they are given: what those of a narrower model mean in the whole one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from surgery.graph.cutting import Cut


@dataclass(frozen=True)
class Narrow:
    """A norm of the narrower model, and its channels among those of the whole."""

    module: nn.Module
    kept: tuple[int, ...]


def narrow_norms(model: nn.Module, cuts: Sequence[Cut]) -> dict[str, Narrow]:
    """Copies of those norms of a model that was cut whose mean over fewer channels is another one."""
    return {
        norm.path: Narrow(copy.deepcopy(model.get_submodule(norm.path)), cut.kept)
        for cut in cuts
        for norm in cut.group.norms
        if not norm.exact
    }


@contextmanager
def looking_at(model: nn.Module, norms: Mapping[str, Narrow]) -> Iterator[None]:
    """Inside, the norms of the whole model compute of the channels that stay what the narrow ones do; zeros else."""
    handles = [model.get_submodule(path).register_forward_hook(_instead(norm)) for path, norm in norms.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _instead(norm: Narrow) -> Callable[[nn.Module, tuple[Any, ...], Any], Tensor]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
        kept = torch.tensor(norm.kept, device=args[0].device)
        found: Tensor = norm.module(args[0].index_select(-1, kept))
        return torch.zeros_like(args[0], dtype=found.dtype).index_copy(-1, kept, found)

    return hook
