"""Carrying out a plan place by place, on a model whose numbers lie elsewhere and are lent while they are needed.

The statements' own code runs on the same drafts as in `apply`, with the same seeds, so the same bits come out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

from torch import Tensor, nn

from surgery.anatomy.parts import Part
from surgery.compiler import required
from surgery.compiler.apply import Context, check_texts
from surgery.compiler.drafts import Drafts, visited
from surgery.compiler.plan import Plan, Step
from surgery.graph.blank import lending, lent
from surgery.graph.draft import Draft


@dataclass(frozen=True)
class Place:
    """One draft's worth of work. visits: the steps that act there, in order, each with its part.

    reads: full names of the base's tensors whose numbers are needed there, and come out of it, changed or not.
    """

    key: tuple[str, str]
    visits: tuple[tuple[Step, Part], ...]
    reads: tuple[str, ...]


def whole_model(plan: Plan) -> str | None:
    """Why a plan cannot be carried out place by place; None when it can."""
    for step in plan.steps:
        operation = step.operation
        if step in plan.reshaping or operation.phase in ("shrink", "route"):
            return f"`{step.statement}` gives the model another shape"
        if operation.layerwise:
            continue
        if operation.collective:
            return f"`{step.statement}` compares its places with each other"
        if operation.starts_from == "model":
            return f"`{step.statement}` starts from what the whole model computes"
    return required.whole_model(plan)


class Stream:
    """A plan on its way through a model without numbers, of which every place is visited once.

    Any number of streams may share the work: what comes of a place depends on nothing but that place.
    """

    def __init__(self, plan: Plan, model: nn.Module, tokenizer: Any = None) -> None:
        self.plan, self.model = plan, model
        self.context = Context(model, tokenizer, plan.program.seed, plan.anatomy)
        self.drafts = Drafts(model, hollow=False, seed=plan.program.seed)
        self._tracing = Lock()  # torch.fx replaces functions of other modules while it traces
        self.base = {
            *(name for name, _ in model.named_parameters(remove_duplicate=False)),
            *(name for name, _ in model.named_buffers(remove_duplicate=False)),
        }
        order = {path: index for index, (path, _) in enumerate(model.named_modules(remove_duplicate=False))}
        places = [
            Place(key, tuple((plan.steps[index], part) for index, part in found), _reads(plan, model, key, found))
            for key, found in visited(plan.steps)
        ]
        self.places: Sequence[Place] = sorted(places, key=lambda place: (order[place.key[0]], place.key[1]))

    def prepare(self, read: Callable[[str], Tensor]) -> None:
        """Do what compares places with each other, a layer at a time, before any place is visited.

        read: a tensor of the base by its full name.
        """
        check_texts(self.plan.steps, self.context.tokenizer, self.plan.anatomy)
        layers = [f"{stack.path}.{index}" for stack in self.plan.anatomy.stacks for index in range(stack.depth)]
        for step in self.plan.steps:
            if step.operation.collective:
                sites = [self.drafts.site(step, part) for part in step.parts]
                for site in sites:
                    step.operation.rewrite(site)
                with lending(self.model, layers, read):
                    step.operation.fill(sites, self.context)

    def at(self, place: Place, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the model has at a place afterwards, by full name; of the base's own tensors only those it `reads`.

        tensors: those. The place is forgotten.
        """
        with lent(self.model, tensors):
            for step, part in place.visits:
                if step.operation.collective:
                    continue  # it is prepared
                with self._tracing:
                    site = self.drafts.site(step, part)
                    step.operation.rewrite(site)
                step.operation.fill([site], self.context)
            draft = self.drafts.made.pop(place.key)
            if isinstance(draft, Draft):
                draft.settle()
            # Without the parameters that hold them: those are let go of in a moment.
            made = {name: tensor.detach() for name, tensor in _tensors(draft.root, draft.home)}
        return {name: tensor for name, tensor in made.items() if name not in self.base or name in place.reads}


def _reads(plan: Plan, model: nn.Module, key: tuple[str, str], found: Sequence[tuple[int, Part]]) -> tuple[str, ...]:
    """Every tensor of the module, where a step starts from one or changes one."""
    path, _ = key
    if any(part.apart for _, part in found):
        return ()
    operations = [plan.steps[index].operation for index, _ in found]
    if all(operation.starts_from == "chance" and not operation.changes_base for operation in operations):
        return ()
    module = model.get_submodule(path)
    kept = module._non_persistent_buffers_set
    names = [
        name for store in (module._parameters, module._buffers) for name, held in store.items() if held is not None
    ]
    return tuple(f"{path}.{name}" if path else name for name in names if name not in kept)


def _tensors(root: nn.Module, home: str) -> Iterator[tuple[str, Tensor]]:
    """A draft's own tensors and those of children that were added, by full name."""
    for store in (root.named_parameters, root.named_buffers):
        for name, tensor in store(remove_duplicate=False):
            yield f"{home}.{name}".lstrip("."), tensor
