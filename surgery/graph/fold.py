"""Merging is constant folding: a site that is affine in its input becomes the plain map that it stands for."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.graph.affine import Affine, NotAffine
from surgery.graph.matrix import Stored
from surgery.graph.module import Facts, Rewritten
from surgery.graph.rounding import Rounding, measured, rounded

TRACING = Lock()  # torch.fx writes code, and replaces functions of other modules while it traces


def affine(site: nn.Module, facts: Facts | None, forward: Callable[[Any], Any] | None = None) -> Affine:
    """What a map computes in evaluation, as a matrix and an offset. NotAffine tells the reason when it cannot.

    forward: what to run, unsaid its own code: what hooks add, such as an adapter after it, is not folded and stays.
    """
    if facts is None:
        raise NotAffine("it is not a linear map or a lookup")
    wide = torch.float64 if facts.dtype == torch.float64 else torch.float32
    width = facts.shape[0] if facts.lookup else facts.shape[1]
    device = next(site.parameters()).device
    training = site.training
    try:
        site.eval()
        with torch.no_grad():
            run = site.forward if forward is None else forward
            value = run(Affine(width, dtype=wide, one_hot=facts.lookup, device=device))
    finally:
        site.train(training)
    if not isinstance(value, Affine):
        raise NotAffine("its output does not depend on its input")
    return value


def fold(site: Rewritten, told: dict[str, Rounding] | None = None) -> nn.Module:
    """The original module again, computing what the site does; sums are taken wide and rounded once.

    Where the original's forward does more than a plain map, the tensors are those that make it compute the site's
    matrix and offset; NotAffine when there are none. A tensor that would not change stays the same object, and tied.
    The site itself is not touched, but its original may hold other tensors afterwards: put the result in its place.
    told: gets what rounding did to the change of the weight and the bias, under their names, where branches make one.
    """
    facts = site.facts
    value = affine(site, facts)
    assert facts is not None
    before = without_branches(site) if told is not None and facts.plain else None
    module = site.original
    module.train(site.training)
    matrix, offset = value.whole, value.offset
    if not facts.plain:
        dense, offset = _undone(module, facts, matrix.dense(), offset, site._parameters.get("bias"))
        matrix = Stored(dense, dense.dtype)
    weight, found = rounded(
        matrix, _dtype(site, facts), facts.lookup or facts.transposed, None if before is None else before.whole
    )
    if told is not None and found is not None:
        told["weight"] = found
    _hold(module, "weight", weight, site)
    bias = site._parameters.get("bias")
    if offset is not None or bias is not None:
        offset = torch.zeros(facts.shape[0], device=matrix.device) if offset is None else offset
        held = offset.to(weight.dtype if bias is None else bias.dtype)
        if told is not None and before is not None and not held.is_meta:
            told["bias"] = measured(
                offset.clone(), held, torch.zeros_like(offset) if before.offset is None else before.offset
            )
        _hold(module, "bias", held, site)
    return module


def without_branches(site: Rewritten) -> Affine | None:
    """The map that the site's branches change; None where there are none that run."""
    if not site.branches() - site.off:
        return None
    return affine(site, site.facts, lambda value: _base(site, value))


def _base(site: Rewritten, value: Any) -> Any:
    """What the base alone makes of a value: of each joint its first argument, and nothing that only branches need."""
    sources = {node: node.args[:1] if "joint" in node.meta else node.all_input_nodes for node in site.full.nodes}
    needed = [site.full.output_node()]
    for node in needed:
        needed += [source for source in sources[node] if source not in needed]
    run = fx.Interpreter(site, garbage_collect_values=False, graph=site.full)
    run.args_iter = iter((value,))
    for node in site.full.nodes:
        if node in needed:
            run.env[node] = run.env[node.args[0]] if "joint" in node.meta else run.run_node(node)
    return run.env[needed[0]]


def _undone(
    module: nn.Module, facts: Facts, matrix: Tensor, offset: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The stored matrix and bias for which a module with a forward of its own computes the given ones.

    Solved where the forward multiplies its weight by a number and adds its bias as it is: tried on the matrix itself.
    """
    before = dict(module._parameters)
    try:
        found = _tried(module, facts, matrix)
        factor = float(
            (found.dense() * matrix).sum() / (matrix * matrix).sum().clamp(min=torch.finfo(matrix.dtype).tiny)
        )
        if factor == 0:
            raise NotAffine("its own forward does not use its weight as it is")
        found = _tried(module, facts, matrix / factor)  # a forward that normalises, say, gives another factor now
        error = (found.dense() - matrix).abs().max()
        if not error <= 16 * torch.finfo(facts.dtype).eps * matrix.abs().max():
            raise NotAffine("its own forward changes its weight by more than a factor")
        nothing = matrix.new_zeros(())
        lacks = (nothing if offset is None else offset) - (nothing if found.offset is None else found.offset)
        if bias is None and bool(lacks.any()):
            raise NotAffine("it would need a bias, which it does not have")
        return matrix / factor, None if bias is None else bias.detach().to(matrix.dtype) + lacks
    finally:
        module._parameters.clear()
        module._parameters.update(before)


def _tried(module: nn.Module, facts: Facts, matrix: Tensor) -> Affine:
    """What a module computes with this (out, in) matrix as its weight, or (width, vocabulary) table."""
    stored = matrix.t() if facts.lookup or facts.transposed else matrix
    module.register_parameter("weight", nn.Parameter(stored.to(facts.dtype).contiguous(), requires_grad=False))
    return affine(module, facts)


def _hold(module: nn.Module, name: str, value: Tensor, site: Rewritten) -> None:
    """Register a tensor, or the site's own where it says the same."""
    before = site._parameters.get(name)
    known = before is not None and not before.is_meta and before.dtype == value.dtype
    if before is not None and known and torch.equal(before, value):
        module.register_parameter(name, before)
        return
    module.register_parameter(name, nn.Parameter(value, requires_grad=False))


def _dtype(site: Rewritten, facts: Facts) -> torch.dtype:
    """Of the weight as it is now, the model may have been cast; codes come back as wide as they would be by now."""
    weight = site._parameters.get("weight")
    return facts.dtype if weight is None else weight.dtype
