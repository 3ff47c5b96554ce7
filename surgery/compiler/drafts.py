"""Drafts of all places that a plan touches, made when first asked for; and the site that a statement edits there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from torch import nn

from surgery.anatomy.parts import Part
from surgery.compiler.plan import Step
from surgery.graph.attention import AttentionDraft, AttentionSite
from surgery.graph.draft import Draft
from surgery.graph.module import standings
from surgery.graph.site import Site


class Drafts:
    """One draft for each place, shared by the statements that act there. hollow: shapes only, nothing computed."""

    def __init__(self, model: nn.Module, hollow: bool, seed: int) -> None:
        self.model, self.hollow, self.seed = model, hollow, seed
        self.made: dict[tuple[str, bool], Draft | AttentionDraft] = {}
        self.pools: dict[str, dict[str, nn.Parameter]] = defaultdict(dict)
        self.slots = standings(model)

    def __iter__(self) -> Iterator[Draft | AttentionDraft]:
        return iter(self.made.values())

    def site(self, step: Step, part: Part) -> Site:
        """The place of a part as the step's statement sees it."""
        statement, verb = str(step.statement), step.operation.verb
        draft = self._draft(part, statement)
        if isinstance(draft, AttentionDraft):
            return AttentionSite(draft, part, statement, step.statement.name, verb, self.seed)
        return Site(draft, part, statement, step.statement.name, verb, self.seed)

    def _draft(self, part: Part, statement: str) -> Draft | AttentionDraft:
        attends = part.kind == "attention"
        key = (part.path, attends)
        if key not in self.made:
            module = self.model.get_submodule(part.path)
            if attends:
                self.made[key] = AttentionDraft(module, part, hollow=self.hollow, pool=self.pools[statement])
            else:
                self.made[key] = Draft(module, part.path, part.parameter, self.hollow, self.slots[id(module)])
        return self.made[key]
