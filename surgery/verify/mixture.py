"""The promise of mixtures of experts: where the experts agree, the mixture is any one of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch

from surgery.graph.experts import MixtureOfExperts, mixtures
from surgery.verify.bounds import coarsest, merge_bound, relative_error
from surgery.verify.report import Finding
from surgery.verify.subject import Subject

TOKENS = 24
"""More than experts, as a rule: the tokens spread over several of them."""


def experts_agree(subject: Subject) -> Iterator[Finding]:
    """With every expert made the first one, each token gets what the first gives, whatever the router says."""
    steps = [step for step in subject.plan.steps if "experts_agree" in step.operation.promises()]
    statements = "; ".join(str(step.statement) for step in steps)
    for path, module in mixtures(subject.model):
        if any(tensor.is_meta for tensor in module.parameters()):
            continue
        alike = _alike(module)
        like = next(module.parameters())
        x = subject.normal((1, TOKENS, module.router.in_features), like, path, "experts")
        with torch.no_grad():
            found = alike(x)
            _, chosen = alike.route(x[0])
            wanted = alike.one(0, x)
        dtype = coarsest(*(tensor.dtype for tensor in module.parameters()))
        note = f"of {module.routing.experts} experts, {len(chosen.unique())} were chosen"
        yield Finding("experts_agree", path, relative_error(found, wanted), merge_bound(dtype), statements, note)


def _alike(module: MixtureOfExperts) -> MixtureOfExperts:
    """A copy in eval mode whose experts all are the first one, with a router that tells tokens apart."""
    copied = copy.deepcopy(module).eval()
    with torch.no_grad():
        for tensor in copied.experts.parameters():
            if tensor.is_floating_point():
                tensor.copy_(tensor[:1].clone().expand_as(tensor))
    return copied
