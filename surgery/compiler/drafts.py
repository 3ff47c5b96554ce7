"""Drafts of all places that a plan touches, made when first asked for; and the site that a statement edits there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

from torch import nn

from surgery.anatomy.parts import Part
from surgery.compiler.plan import Step
from surgery.graph.attention import AttentionDraft, AttentionSite
from surgery.graph.draft import Draft
from surgery.graph.edge import EdgeDraft, EdgeSite
from surgery.graph.module import standings
from surgery.graph.site import Site


class AnyDraft(Protocol):
    """A place being rewritten. `finish` may fail and touches nothing of the model; `install` changes it."""

    root: nn.Module

    def finish(self) -> nn.Module: ...

    def install(self, model: nn.Module) -> nn.Module: ...


@dataclass(frozen=True)
class Place:
    """What a draft is made of.

    part: the first that a statement acts on there. hollow: shapes only, nothing computed.
    pool: parameters that the places of one statement share. slots: every (parent, child name) where the module stands.
    """

    model: nn.Module
    module: nn.Module
    part: Part
    hollow: bool
    pool: dict[str, nn.Parameter]
    slots: Sequence[tuple[nn.Module, str]]


@dataclass(frozen=True)
class Way:
    """How parts of a kind are rewritten.

    family: parts of one family at one path share a draft. site: made of (draft, part, statement, name, verb, seed).
    """

    family: str
    draft: Callable[[Place], Any]
    site: Callable[..., Site]


def _map(place: Place) -> Draft:
    return Draft(place.module, place.part.path, place.part.parameter, place.hollow, place.slots)


def _attention(place: Place) -> AttentionDraft:
    return AttentionDraft(place.module, place.part, hollow=place.hollow, pool=place.pool)


def _edge(place: Place) -> EdgeDraft:
    return EdgeDraft(place.model, place.part, place.hollow)


MAP = Way("map", _map, Site)
WAYS: Mapping[str, Way] = MappingProxyType(
    {"attention": Way("attention", _attention, AttentionSite), "edge": Way("edge", _edge, EdgeSite)}
)
"""By kind of part; every other kind is a map."""


def way_of(part: Part) -> Way:
    """How a part is rewritten."""
    return WAYS.get(part.kind, MAP)


class Drafts:
    """One draft for each place, shared by the statements that act there. hollow: shapes only, nothing computed."""

    def __init__(self, model: nn.Module, hollow: bool, seed: int) -> None:
        self.model, self.hollow, self.seed = model, hollow, seed
        self.made: dict[tuple[str, str], AnyDraft] = {}
        self.pools: dict[str, dict[str, nn.Parameter]] = defaultdict(dict)
        self.slots = standings(model)

    def __iter__(self) -> Iterator[AnyDraft]:
        return iter(self.made.values())

    def site(self, step: Step, part: Part) -> Site:
        """The place of a part as the step's statement sees it."""
        statement, verb = str(step.statement), step.operation.verb
        draft = self._draft(part, statement)
        return way_of(part).site(draft, part, statement, step.statement.name, verb, self.seed)

    def _draft(self, part: Part, statement: str) -> AnyDraft:
        way = way_of(part)
        key = (part.path, way.family)
        if key not in self.made:
            module = self.model.get_submodule(part.path)
            place = Place(self.model, module, part, self.hollow, self.pools[statement], self.slots[id(module)])
            self.made[key] = way.draft(place)
        return self.made[key]
