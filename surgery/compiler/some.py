"""Merging some adapters of a place and leaving the others attached to what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from surgery.compiler.plan import Plan
from surgery.compiler.requantize import has_codes, requantized
from surgery.errors import GraphError
from surgery.graph.draft import Draft
from surgery.graph.fold import fold
from surgery.graph.functions import add_branch, add_to_channels
from surgery.graph.module import Rewritten
from surgery.graph.rounding import Rounding
from surgery.graph.site import Site

ADDED = (add_branch, add_to_channels)


def refuse_dependent(path: str, site: Rewritten, wanted: frozenset[str]) -> None:
    """Errors: GraphError S312 where what stays would do something else once the others are in the weight.

    Sums may be taken in any order. What multiplies has to stay behind what is merged, and what stays must not read the
    weight, or what the merged ones give, but by way of the output.
    """
    joints = [node for node in site.full.nodes if "joint" in node.meta]
    staying = [node for node in joints if node.meta["joint"] not in wanted]
    if site.facts is None or not staying or len(staying) == len(joints):
        return
    merged = {node for node in joints if node.meta["joint"] in wanted}
    base = {node for node in site.full.nodes if {"product", "weight", "stored"} & set(node.meta.get("landmarks", ()))}
    sums = all(node.target in ADDED for node in joints)
    for node in staying:
        reads = _sources(node.args[1:])
        if reads & (merged | base) or (not sums and any(node < other for other in merged)):
            raise GraphError.of(
                "S312",
                f"`{node.meta['joint']}` at {path} depends on what would be merged there",
                help="merge it too, or all at once: `surgery.merge(model)`",
            )


def fold_some(
    path: str,
    site: Rewritten,
    wanted: frozenset[str],
    plan: Plan,
    slots: Sequence[tuple[nn.Module, str]],
    told: dict[str, Rounding] | None = None,
    *,
    requantize: bool = False,
) -> nn.Module:
    """The place with these adapters in its weight and the others on it, holding the tensors that they had.

    It is the original module where no others are there; requantize: codes are codes again. told: as of `fold`. May
    raise NotAffine, which leaves the site as it was.
    """
    state = site.state
    try:
        site.switch(site.branches() - wanted)
        codes = requantize and has_codes(site)
        plain = requantized(path, site, plan, slots, told) if codes else fold(site, told)
    finally:
        site.switch(state[0])
    if site.branches() <= wanted:
        return plain
    visits = [
        (step, part)
        for step in plan.steps
        for part in step.parts
        if part.path == path and not part.apart and step.operation.phase == "attach" and step.operation.rewrites(part)
    ]
    draft = Draft(plain, path, visits[0][1].parameter, hollow=True, slots=slots)
    for step, part in visits:
        if (step.statement.name or "default") not in wanted:
            one = Site(draft, part, str(step.statement), step.statement.name, step.operation.verb, plan.program.seed)
            step.operation.at(part).rewrite(one)
    for name in draft.added:
        for store in ("_parameters", "_buffers", "_modules"):
            if name in site.__dict__[store]:
                draft.root.__dict__[store][name] = site.__dict__[store][name]
    made = draft.finish()
    made.follow(site)
    made.switch(state[0])
    return made


def _sources(values: Any) -> set[fx.Node]:
    """Every node that these values are computed from."""
    found: set[fx.Node] = set()
    waiting: list[fx.Node] = [value for value in values if isinstance(value, fx.Node)]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found
