"""Merging is constant folding: a site that is affine in its input becomes the plain map that it stands for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from surgery.graph.affine import Affine, NotAffine
from surgery.graph.module import Facts, Rewritten


def affine(site: Rewritten) -> Affine:
    """What a site computes in evaluation, as a matrix and an offset. NotAffine tells the reason when it cannot."""
    facts = site.facts
    if facts is None:
        raise NotAffine("it is not a linear map or a lookup")
    wide = torch.float64 if _dtype(site, facts) == torch.float64 else torch.float32
    width = facts.shape[0] if facts.lookup else facts.shape[1]
    training = site.training
    try:
        site.eval()
        with torch.no_grad():
            value = site(Affine(width, dtype=wide, one_hot=facts.lookup))
    finally:
        site.train(training)
    if not isinstance(value, Affine):
        raise NotAffine("its output does not depend on its input")
    return value


def fold(site: Rewritten) -> nn.Module:
    """The plain module that computes what the site does, its sums taken wide and rounded once to the base's dtype.

    The original module comes back with a new weight; where its forward did more than a plain map, an nn.Linear or
    nn.Embedding takes its place. A tensor that would not change stays the same object, and stays tied.
    """
    facts = site.facts
    value = affine(site)
    assert facts is not None
    matrix = value.dense().to(_dtype(site, facts))
    weight = matrix.t() if facts.lookup or facts.transposed else matrix
    module = site.original if facts.plain else _fresh(facts, value.offset is not None)
    module.train(site.training)
    _hold(module, "weight", weight.contiguous(), site)
    offset = value.offset
    if offset is not None or getattr(module, "bias", None) is not None:
        if offset is None:
            offset = torch.zeros(facts.shape[0])
        _hold(module, "bias", offset.to(_bias_dtype(site, facts)), site)
    return module


def _hold(module: nn.Module, name: str, value: Tensor, site: Rewritten) -> None:
    """Register a tensor, or the site's own where it says the same."""
    before = site._parameters.get(name)
    if before is not None and before.dtype == value.dtype and torch.equal(before, value):
        module.register_parameter(name, before)
        return
    module.register_parameter(name, nn.Parameter(value, requires_grad=False))


def _dtype(site: Rewritten, facts: Facts) -> torch.dtype:
    """Of the weight as it is now, the model may have been cast; codes come back as wide as they were."""
    weight = site._parameters.get("weight")
    return weight.dtype if weight is not None and weight.is_floating_point() else facts.dtype


def _bias_dtype(site: Rewritten, facts: Facts) -> torch.dtype:
    bias = site._parameters.get("bias")
    return _dtype(site, facts) if bias is None else bias.dtype


def _fresh(facts: Facts, bias: bool) -> nn.Module:
    rows, columns = facts.shape
    if facts.lookup:
        return nn.Embedding(rows, columns, device="meta")
    return nn.Linear(columns, rows, bias=bias, device="meta")
