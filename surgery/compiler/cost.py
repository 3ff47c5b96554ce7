"""What a plan adds and saves: the rewriting itself, done on shapes once for each kind of place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from surgery.anatomy.parts import Part
from surgery.compiler.training import count
from surgery.errors import Diagnostic, PlanError, SurgeryError, standing_at
from surgery.graph.affine import NotAffine
from surgery.graph.fold import affine
from surgery.graph.module import Rewritten

if TYPE_CHECKING:
    from surgery.compiler.drafts import Drafts
    from surgery.compiler.plan import Step


@dataclass(frozen=True)
class Cost:
    """Counts of numbers, and bytes of all tensors, of the model before and after, and of what each step adds.

    unmerged: steps, and what to say of places of theirs that are no plain maps, and that a merge will leave.
    trained: numbers of the base that each step trains. base_trained: those of all steps, each once.
    """

    parameters: int
    bytes_before: int
    bytes_after: int
    added: tuple[int, ...]
    bytes: tuple[int, ...]
    unmerged: tuple[tuple[int, str], ...] = ()
    trained: tuple[int, ...] = ()
    base_trained: int = 0

    @property
    def trainable(self) -> int:
        return sum(self.added) + self.base_trained

    def after(self, changed: Sequence[int]) -> Cost:
        """The same where the first steps have changed the model itself by so many bytes each."""
        rest = self.bytes[len(changed) :]
        return replace(self, bytes_before=self.bytes_before - sum(changed), bytes=(*changed, *rest))

    def steps_json(self) -> list[dict[str, Any]]:
        trained = self.trained or (0,) * len(self.added)
        counts = zip(self.added, trained, self.bytes, strict=True)
        return [
            {"parameters_added": n, "parameters_trained": t, "bytes_changed": b, **self._left(index)}
            for index, (n, t, b) in enumerate(counts)
        ]

    def _left(self, step: int) -> dict[str, list[str]]:
        texts = [text for index, text in self.unmerged if index == step]
        return {"unmerged": texts} if texts else {}

    def totals_json(self) -> dict[str, Any]:
        total = self.parameters + sum(self.added)
        return {
            "parameters": self.parameters,
            "added": sum(self.added),
            "trainable": self.trainable,
            "trainable_share": self.trainable / total if total else 0.0,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Cost:
        totals, steps = data["totals"], data["steps"]
        return cls(
            totals["parameters"],
            totals["bytes_before"],
            totals["bytes_after"],
            tuple(step["parameters_added"] for step in steps),
            tuple(step["bytes_changed"] for step in steps),
            tuple((index, text) for index, step in enumerate(steps) for text in step.get("unmerged", ())),
            trained=tuple(step.get("parameters_trained", 0) for step in steps),
            base_trained=totals["trainable"] - sum(step["parameters_added"] for step in steps),
        )


def measure(steps: Sequence[Step], model: nn.Module, seed: int = 0, base: Cost | None = None) -> Cost:
    """Rewrite one place of each kind on shapes, and multiply. Errors: those of the rewriting, as PlanError.

    base: of a model that was transformed before, what was measured then.
    """
    from surgery.compiler.drafts import Drafts, visited

    if base is None:
        held = {id(t): t for t in (*model.parameters(), *model.buffers())}
        parameters, before = sum(t.numel() for t in model.parameters()), sum(map(_size, held.values()))
    else:
        parameters, before = base.parameters, base.bytes_before
    drafts = Drafts(model, hollow=True, seed=seed, anew=True)
    added, changed = [0] * len(steps), [0] * len(steps)
    seen: dict[object, list[tuple[int, int, int]]] = {}
    failing: dict[object, list[tuple[tuple[Any, ...], Diagnostic]]] = {}
    refused: dict[tuple[Any, ...], list[Diagnostic]] = {}
    unmerged: list[tuple[int, str]] = []
    for place, visits in visited(steps):
        kind = _kind(model, steps, place, visits)
        if kind not in seen:
            try:
                seen[kind] = _visit(drafts, steps, visits)
                unmerged += _reason(drafts, steps, visits)
            except SurgeryError as error:
                seen[kind] = []
                failing[kind] = [(_alike(each, place[0]), each) for each in error.diagnostics]
        for alike, each in failing.get(kind, ()):
            refused.setdefault(alike, []).append(each)
        for index, new, size in seen[kind]:
            added[index] += new
            changed[index] += size
    if refused:
        raise PlanError(*(_once(each, message) for (*_, message), each in refused.items()))
    for index, step in enumerate(steps):
        for tensor in drafts.shared(step):
            added[index] += tensor.numel()
            changed[index] += _size(tensor)
    trained = tuple(count([step], model) for step in steps)
    return Cost(
        parameters,
        before,
        before + sum(changed),
        tuple(added),
        tuple(changed),
        tuple(unmerged),
        trained,
        count(steps, model),
    )


def _alike(said: Diagnostic, path: str) -> tuple[Any, ...]:
    """Equal for diagnostics that say the same of other places."""
    return said.code, said.span, said.help, said.message.replace(path, "") if path else said.message


def _once(said: Sequence[Diagnostic], message: str) -> Diagnostic:
    """The first of several that say the same; of places, with their number. message: what all of them say."""
    first = said[0]
    if len(said) == 1 or first.label or first.message == message:
        return first
    return replace(first, label=f"{len(said)} such places")


def _kind(model: nn.Module, steps: Sequence[Step], place: tuple[str, str], visits: list[tuple[int, Part]]) -> object:
    """Equal for places where the same edits cost the same."""
    module = model.get_submodule(place[0])
    own = module.original if isinstance(module, Rewritten) else module
    shapes = tuple((name, t.shape, t.dtype) for name, t in module.named_parameters(recurse=False))
    edits = tuple(
        (index, str(steps[index].operation.at(part)), part.role, part.shape, part.channels, part.heads)
        for index, part in visits
    )
    return type(own), shapes, edits


def _visit(drafts: Any, steps: Sequence[Step], visits: list[tuple[int, Part]]) -> list[tuple[int, int, int]]:
    """(step, trainable numbers added, bytes changed) of one place, without what the step's places share."""
    costs: list[tuple[int, int, int]] = []
    before: dict[int, Tensor] | None = None
    for index, part in visits:
        with standing_at(steps[index].statement.span):
            site = drafts.site(steps[index], part)
            before = _tensors(site.draft.root) if before is None else before
            steps[index].operation.rewrite(site)
        after = _tensors(site.draft.root)
        shared = {id(t) for t in drafts.pool.values()}
        new = [t for key, t in after.items() if key not in before and key not in shared]
        gone = [t for key, t in before.items() if key not in after]
        trained = sum(t.numel() for t in new if isinstance(t, nn.Parameter) and t.requires_grad)
        costs.append((index, trained, sum(map(_size, new)) - sum(map(_size, gone))))
        before = after
    return costs


def _reason(drafts: Drafts, steps: Sequence[Step], visits: list[tuple[int, Part]]) -> list[tuple[int, str]]:
    """Why a module with a forward of its own cannot take what is attached to it, where the plan says that it merges."""
    merging = [(index, part) for index, part in visits if "merges" in steps[index].operation.promises()]
    if not merging:
        return []
    facts = getattr(drafts.site(steps[visits[-1][0]], visits[-1][1]).draft, "facts", None)
    if facts is None or facts.plain:
        return []
    try:
        affine(drafts.model.get_submodule(visits[-1][1].path), facts)
    except NotAffine as reason:
        return [(i, f"`{steps[i].statement}` cannot merge at {part.path}: {reason}") for i, part in merging]
    return []


def _tensors(root: nn.Module) -> dict[int, Tensor]:
    return {id(t): t for t in (*root.parameters(), *root.buffers())}


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
