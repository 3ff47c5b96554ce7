"""Drafts of all places that a plan touches, made when first asked for; and the site that a statement edits there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import nn

from surgery.anatomy.parts import Part
from surgery.compiler.plan import Step
from surgery.graph.attention import AttentionDraft, AttentionSite
from surgery.graph.draft import AnyDraft, Draft
from surgery.graph.edge import EdgeDraft, EdgeSite
from surgery.graph.module import CODES, Rewritten, standings
from surgery.graph.site import Site
from surgery.graph.soft_entry import EntryDraft, EntrySite
from surgery.graph.stack import StackDraft, StackSite


def ours(standing: Rewritten) -> dict[str, Any]:
    """Tensors and children that programs have put into a place, by name."""
    held = {**standing._parameters, **standing._buffers, **standing._modules}
    return {name: held[name] for name in (*standing.added, CODES) if name in held}


@dataclass(frozen=True)
class Place:
    """What a draft is made of.

    part: the first that a statement acts on there. hollow: shapes only, nothing computed.
    pool: parameters that several places share, by statement and name. anew: begin with the base, and not with what an
    earlier program has put there. slots: every (parent, child name) where the module stands.
    """

    model: nn.Module
    module: nn.Module
    part: Part
    hollow: bool
    pool: dict[str, nn.Parameter]
    slots: Sequence[tuple[nn.Module, str]]
    anew: bool


@dataclass(frozen=True)
class Way:
    """How parts of a kind are rewritten.

    family: parts of one family at one path share a draft. site: made of (draft, part, statement, name, verb, seed).
    """

    family: str
    draft: Callable[[Place], AnyDraft[Any]]
    site: Callable[..., Site]


def _map(place: Place) -> Draft:
    return Draft(place.module, place.part.path, place.part.parameter, place.hollow, place.slots, place.anew)


def _attention(place: Place) -> AttentionDraft:
    return AttentionDraft(place.module, place.part, hollow=place.hollow, pool=place.pool, anew=place.anew)


def _edge(place: Place) -> EdgeDraft:
    return EdgeDraft(place.model, place.part, place.hollow, place.anew)


def _entry(place: Place) -> EntryDraft:
    return EntryDraft(place.model, place.part, place.hollow, place.anew)


def _stack(place: Place) -> StackDraft:
    return StackDraft(place.module, place.part, place.hollow, place.anew)


MAP = Way("map", _map, Site)
WAYS: Mapping[str, Way] = MappingProxyType(
    {
        "attention": Way("attention", _attention, AttentionSite),
        "edge": Way("edge", _edge, EdgeSite),
        "entry": Way("entry", _entry, EntrySite),
        "experts": Way("experts", _stack, StackSite),
    }
)
"""By kind of part; every other kind is a map."""


def way_of(part: Part) -> Way:
    """How a part is rewritten."""
    return WAYS.get(part.kind, MAP)


def place_of(part: Part) -> tuple[str, str]:
    """Equal for parts that share a draft."""
    return part.path, way_of(part).family


def visited(steps: Sequence[Step]) -> Iterable[tuple[tuple[str, str], list[tuple[int, Part]]]]:
    """Every place that is rewritten with the steps that act there, in order."""
    places: dict[tuple[str, str], list[tuple[int, Part]]] = {}
    for index, step in enumerate(steps):
        for part in step.parts:
            if step.operation.rewrites(part):
                places.setdefault(place_of(part), []).append((index, part))
    return places.items()


class Drafts:
    """One draft for each place, shared by the statements that act there. hollow: shapes only, nothing computed.

    anew: each begins with the base, whatever an earlier program has put there, for all statements to be written again.
    """

    def __init__(self, model: nn.Module, hollow: bool, seed: int, anew: bool = False) -> None:
        self.model, self.hollow, self.seed, self.anew = model, hollow, seed, anew
        self.made: dict[tuple[str, str], AnyDraft[Any]] = {}
        self.pool: dict[str, nn.Parameter] = {}
        self.slots = standings(model)

    def __iter__(self) -> Iterator[AnyDraft[Any]]:
        """In the order in which they are installed: what hangs on a module after the module itself."""
        order = [MAP.family, *(way.family for way in WAYS.values())]
        return iter([self.made[key] for key in sorted(self.made, key=lambda key: order.index(key[1]))])

    def site(self, step: Step, part: Part, keep: bool = False) -> Site:
        """The place of a part as the step's statement sees it. keep: take the tensors that an earlier program made."""
        statement, verb = str(step.statement), step.operation.verb
        draft = self._draft(part)
        site = way_of(part).site(draft, part, statement, step.statement.name, verb, self.seed)
        if keep and draft.standing is not None:
            site.kept = ours(draft.standing)
        return site

    def shared(self, step: Step) -> list[nn.Parameter]:
        """Parameters that the places of a step have together."""
        return [tensor for key, tensor in self.pool.items() if key.startswith(f"{step.statement}\0")]

    def _draft(self, part: Part) -> AnyDraft[Any]:
        way, key = way_of(part), place_of(part)
        if key not in self.made:
            module = self.model.get_submodule(part.path)
            slots = self.slots[id(module)]
            self.made[key] = way.draft(Place(self.model, module, part, self.hollow, self.pool, slots, self.anew))
        return self.made[key]
