"""A transformed model as the checks see it: run without a trace, its distinct places, seeded random numbers."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from surgery.anatomy.parts import Part
from surgery.compiler.plan import Plan, Step
from surgery.graph.edge import bare
from surgery.graph.module import Rewritten, rewritten

ROWS = 5
"""How many random inputs a place is tried on."""


@dataclass(frozen=True)
class Place:
    """One rewritten projection or lookup that stands for `sites` equal ones. visits: what acts there, in order."""

    path: str
    module: Rewritten
    visits: tuple[tuple[Step, Part], ...]
    sites: int

    def copied(self) -> Rewritten:
        """An independent copy in eval mode with everything switched on: its tensors may be written to."""
        copied = copy.deepcopy(self.module).eval()
        copied.switch(frozenset())
        bare(copied)  # what hangs on its edge is checked by itself
        return copied

    def statements(self) -> str:
        return "; ".join(dict.fromkeys(str(step.statement) for step, _ in self.visits))


@dataclass(frozen=True)
class Subject:
    """The model, what was done to it, and inputs to run it on (None where nobody knows what a plain module takes).

    args, kwargs: of the model's forward. tokenizer: to read the texts of the program, where there is one.
    seed: of all random numbers of the checks.
    """

    model: nn.Module
    plan: Plan
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None
    tokenizer: Any = None
    seed: int = 0

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps that act on the model as it is; those that gave it its shape have parts of the model before."""
        return tuple(step for step in self.plan.steps if not step.operation.reshapes())

    @property
    def runs(self) -> bool:
        """Whether the whole model can be run, and not only its places."""
        return self.kwargs is not None and not any(tensor.is_meta for tensor in self.model.parameters())

    def output(self) -> Tensor:
        """The model's first floating-point output, in eval mode and without gradients."""
        with undisturbed(self.model), torch.no_grad():
            return first_tensor(self.model(*self.args, **(self.kwargs or {})))

    @cached_property
    def dtype(self) -> torch.dtype:
        """What activations have: the dtype of most of the base's floating numbers that are no program's."""
        counts: dict[torch.dtype, int] = {}
        added = {f"{path}.{name}" for path, module in rewritten(self.model) for name in module.added}
        for name, tensor in self.model.named_parameters():
            if tensor.is_floating_point() and name not in added:
                counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
        return max(counts, key=lambda dtype: counts[dtype], default=torch.get_default_dtype())

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """Projections and lookups that were rewritten, one of each kind."""
        visits: dict[int, list[tuple[Step, Part]]] = {}
        for step in self.steps:
            for part in step.parts:
                if not part.apart and step.operation.rewrites(part):
                    visits.setdefault(id(self.model.get_submodule(part.path)), []).append((step, part))
        groups: dict[object, list[tuple[str, Rewritten, tuple[tuple[Step, Part], ...]]]] = {}
        for path, module in rewritten(self.model):
            mine = tuple(visits.get(id(module), ()))
            if mine:
                groups.setdefault(_kind(module, mine), []).append((path, module, mine))
        return tuple(Place(*group[0], len(group)) for group in groups.values())

    def generator(self, *words: object) -> torch.Generator:
        """Random numbers for one purpose, whatever else is checked."""
        digest = hashlib.sha256("\0".join(map(str, (self.seed, *words))).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def normal(self, shape: tuple[int, ...], like: Tensor, *words: object) -> Tensor:
        """Standard normal numbers with a tensor's dtype and device."""
        drawn = torch.randn(shape, generator=self.generator(*words), dtype=torch.float64)
        return drawn.to(like.device, like.dtype)

    def input_for(self, place: Place) -> Tensor:
        """(5, in) random features, or (5,) token ids for a lookup."""
        part = place.visits[0][1]
        device = next(place.module.parameters()).device
        if part.kind == "lookup":
            return torch.randint(part.shape[0], (ROWS,), generator=self.generator(place.path, "ids")).to(device)
        like = torch.empty(0, dtype=self.dtype, device=device)
        return self.normal((ROWS, part.shape[1]), like, place.path, "x")

    @torch.no_grad()
    def randomise(self, module: nn.Module, path: str) -> None:
        """Random values for what is trained, of a size that matters next to the base."""
        added = getattr(module, "added", ())
        for name, parameter in module.named_parameters():
            if name.partition(".")[0] in added and parameter.is_floating_point():
                draw = self.normal(tuple(parameter.shape), parameter, path, name)
                spread = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.2
                centre = parameter if parameter.dim() < 2 else torch.zeros_like(parameter)
                size = centre.abs().mean() if parameter.dim() < 2 and centre.abs().any() else 1.0
                parameter.copy_(centre + spread * size * draw)


def _kind(module: Rewritten, visits: tuple[tuple[Step, Part], ...]) -> object:
    """Equal for places whose checks would be the same calculation with other numbers."""
    tensors = tuple(
        (name, tensor.shape, tensor.dtype) for name, tensor in (*module.named_parameters(), *module.named_buffers())
    )
    statements = tuple((str(step.statement), part.role, part.channels) for step, part in visits)
    return type(module.original), tensors, str(module.full), statements


def first_tensor(value: Any) -> Tensor:
    """The first floating tensor in whatever a model gives back."""
    if isinstance(value, Tensor):
        return value
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    for item in items:
        try:
            return first_tensor(item)
        except TypeError:
            continue
    raise TypeError(f"no tensor in a {type(value).__name__}")


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module's mode and the random state are as before."""
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({tensor.device.index or 0 for tensor in model.parameters() if tensor.is_cuda})
    with torch.random.fork_rng(devices=devices):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
