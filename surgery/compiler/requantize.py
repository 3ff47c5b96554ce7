"""Merging into codes: the wide sum is encoded again, in the format that the codes had."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from surgery.compiler.plan import Plan
from surgery.graph.draft import Draft
from surgery.graph.fold import TRACING, affine, fold, without_branches
from surgery.graph.module import CODES, Rewritten
from surgery.graph.rounding import Rounding, measured
from surgery.graph.site import Site


def has_codes(module: nn.Module) -> bool:
    """Whether a place keeps its weight as codes."""
    return isinstance(module, Rewritten) and CODES in module._parameters


def requantized(
    path: str,
    site: Rewritten,
    plan: Plan,
    slots: Sequence[tuple[nn.Module, str]],
    told: dict[str, Rounding] | None = None,
) -> Rewritten:
    """The place with nothing but codes, of all that runs there now. May raise NotAffine.

    Codes that stand for that sum already stay the very codes. told: as of `fold`; the weight's error is what encoding
    does to the sum.
    """
    exact = affine(site, site.facts).whole
    base = without_branches(site)
    plain = fold(site, told)
    assert site.facts is not None
    hollow = exact.device.type == "meta"
    if not site.facts.plain:  # its forward does more than multiply: the sum is what makes it compute that
        stored = plain._parameters["weight"]
        assert stored is not None
        weight = (stored.t() if site.facts.transposed else stored).detach().to(exact.dtype)
    else:
        weight = torch.empty(0) if hollow else exact.dense()
    with TRACING:
        draft = Draft(plain, path, hollow=hollow, slots=slots)
        for step in plan.steps:
            for part in step.parts if step.operation.phase == "quantize" else ():
                if part.path == path:
                    one = Site(
                        draft, part, str(step.statement), step.statement.name, step.operation.verb, plan.program.seed
                    )
                    step.operation.at(part).rewrite(one)
    if not hollow:
        _encode(draft, site, weight)
        if told is not None and base is not None:
            told["weight"] = measured(weight, _widened(draft), base.whole.dense())
    with TRACING:
        made = draft.finish()
    made.follow(site)
    plain._parameters["weight"] = None  # codes stand for it
    return made


def _encode(draft: Draft, site: Rewritten, weight: Tensor) -> None:
    held = {**site._parameters, **site._buffers}
    for name in (CODES, *draft.added):
        tensor = held[name]
        assert tensor is not None
        draft.tensor(name).data.copy_(tensor)
    if not torch.equal(_widened(draft).to(weight.dtype), weight):
        assert draft.encode is not None
        draft.encode(weight)


def _widened(draft: Draft) -> Tensor:
    """The (out, in) weight that the codes stand for."""
    return draft.evaluate(draft.captured.weight).detach()
