"""Promises about one place, each checked on a copy of it: identity, merging, off means off, exact codes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.anatomy.parts import Part
from surgery.compiler.plan import Step
from surgery.graph.affine import NotAffine
from surgery.graph.codes import DEQUANTIZE, LARGEST, dequantize_4bit, dequantize_8bit, encode_8bit
from surgery.graph.draft import Draft
from surgery.graph.fold import fold
from surgery.graph.functions import linear_as
from surgery.graph.module import Facts, Rewritten, without
from surgery.graph.site import Site
from surgery.verify.bounds import coarsest, merge_bound, relative_error
from surgery.verify.report import Finding
from surgery.verify.subject import Place, Subject, first_tensor

COLUMNS = 256
"""How many columns of a matrix are read off its code as G(e_i) - G(0); of wider ones a random choice is."""


def identity_at_init(subject: Subject) -> Iterator[Finding]:
    """Every statement that promises it, attached afresh to the base as it is now, must not change a bit of the output.

    Exact for zero-initialised branches. An init that takes A and B out of the weight (pissa) rounds, and is held to
    the bound of a merge.
    """
    for place in subject.places:
        for step, part in place.visits:
            if "identity_at_init" not in step.operation.promises():
                continue
            x = subject.input_for(place)
            with torch.no_grad():
                base = _base_only(place.copied())
                fresh = _attached(base, step, part, subject.plan.program.seed)
                wanted, found = first_tensor(base(x)), first_tensor(fresh(x))
            bound = merge_bound(coarsest(*_dtypes(fresh), subject.dtype), 1, 1.0) if _moved(place, fresh) else 0.0
            error = relative_error(found, wanted) if bound else _unequal(found, wanted)
            yield Finding("identity_at_init", place.path, error, bound, str(step.statement), sites=place.sites)


def merges(subject: Subject) -> Iterator[Finding]:
    """With what is trained at random, the folded module gives what the generated code gives, within rounding.

    A second witness reads the matrix off the code, G(I) - G(0), and compares it with the folded weight.
    """
    for place in subject.places:
        if not any("merges" in step.operation.promises() for step, _ in place.visits):
            continue
        copied = place.copied()
        subject.randomise(copied, place.path)
        x = subject.input_for(place)
        with torch.no_grad():
            wanted, base = first_tensor(copied(x)), first_tensor(_off(copied)(x))
            dtype = coarsest(*_dtypes(copied), subject.dtype)
        attached = [step for step, _ in place.visits if step.operation.phase == "attach"]
        try:
            folded = fold(copied)
        except NotAffine as reason:
            plain = copied.facts is not None and copied.facts.plain  # else the plan has said that it stays
            if plain and all("merges" in step.operation.promises() for step in attached):
                yield _finding(place, float("inf"), 1.0, f"it does not fold: {reason}")
            else:
                yield Finding("merges", place.path, statement=place.statements(), skipped=f"cannot merge: {reason}")
            continue
        weight = _matrix_of(folded, copied)
        bound = merge_bound(dtype, 1, _branch(weight, copied))
        assert copied.facts is not None
        with torch.no_grad():
            merged = first_tensor(folded.eval()(x))
            read, at_zero, columns = _matrix(copied, copied.facts, subject, place)
            # Of a class that does more with its weight than a product (a scaled embedding), what it then computes.
            held = weight[:, columns] if copied.facts.plain else _matrix(folded, copied.facts, subject, place)[0]
        yield _finding(place, relative_error(merged, wanted), bound, "merged against unmerged output")
        yield _finding(place, relative_error(held, read), bound, "folded weight against G(I) - G(0)")
        bias = folded._parameters.get("bias")
        if bias is not None:
            scale = max(weight.abs().max().item(), bias.abs().max().item())
            error = (bias.double() - at_zero.double()).abs().max().item() / scale
            yield _finding(place, error, bound, "folded bias against G(0)")
        if attached and torch.equal(wanted, base):
            yield _finding(place, float("inf"), 1.0, "what was attached has no effect at all")


def off_means_off(subject: Subject) -> Iterator[Finding]:
    """With every branch switched off a place gives the bits of its base, and switched on again those it gave before."""
    for place in subject.places:
        if not any("off_means_off" in step.operation.promises() for step, _ in place.visits):
            continue
        copied = place.copied()
        subject.randomise(copied, place.path)
        x = subject.input_for(place)
        with torch.no_grad():
            on = first_tensor(copied(x))
            base = _independent(copied, x)
            copied.switch({None})
            off = first_tensor(copied(x))
            copied.switch(frozenset())
            again = first_tensor(copied(x))
        yield Finding("off_means_off", place.path, _unequal(off, base), 0.0, place.statements(), "off", "", place.sites)
        yield Finding("off_means_off", place.path, _unequal(again, on), 0.0, place.statements(), "on again")


def exact_codes(subject: Subject) -> Iterator[Finding]:
    """Codes are a fixed point of bitsandbytes' encoder: what they stand for encodes to the same values."""
    for place in subject.places:
        draft = Draft(place.module, place.path, _parameter(place))
        for node in draft.graph.nodes:
            if node.target not in DEQUANTIZE:
                continue
            state = tuple(
                draft.evaluate(each).detach() if isinstance(each, torch.fx.Node) else each for each in node.args
            )
            wrong = _moved_8bit(*state) if node.target is dequantize_8bit else _moved_4bit(*state)
            yield Finding("exact_codes", place.path, wrong, 0.0, place.statements(), "weights", "", place.sites)


def _moved_4bit(packed: Tensor, absmax: Tensor, *state: Any) -> int:
    import bitsandbytes.functional as bnb

    form, block, shape = state[3:6]
    # With every scale at one: double quantization may give a block a scale of zero or below.
    unit = torch.ones(absmax.numel(), device=absmax.device)
    rest = (unit, None, None, None, form, block, shape, torch.float32)
    wide = dequantize_4bit(packed, *rest)
    codes, _ = bnb.quantize_4bit(wide.contiguous(), blocksize=block, quant_type=form)
    return int((dequantize_4bit(codes, *rest) != wide).sum())


def _moved_8bit(packed: Tensor, absmax: Tensor, _: Any) -> int:
    # With the magnitude of every row at the largest code, so that weights are whole numbers.
    again, _found = encode_8bit(dequantize_8bit(packed, torch.full_like(absmax, LARGEST), torch.float32))
    return int((again != packed).sum())


def _finding(place: Place, error: float, bound: float, note: str) -> Finding:
    return Finding("merges", place.path, error, bound, place.statements(), note, sites=place.sites)


def _unequal(found: Tensor, wanted: Tensor) -> float:
    """How many numbers differ; -0.0 is 0.0."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return float("inf")
    return float((found != wanted).sum().item())


def _parameter(place: Place) -> str:
    return place.visits[0][1].parameter


def _off(module: Rewritten) -> Rewritten:
    """A copy that runs without any branch."""
    import copy

    copied = copy.deepcopy(module)
    copied.switch({None})
    return copied


def _base_only(module: Rewritten) -> Rewritten:
    """A place without its branches, as if they had never been attached; its base is masked and quantized as it is."""
    graph = without(module.full, module.branches())
    root = nn.Module()
    for store in ("_parameters", "_buffers", "_modules"):
        root.__dict__[store] = dict(module.__dict__[store])
    root._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    return Rewritten.build(root, graph, module.original, (), module.facts)


def _attached(base: Rewritten, step: Step, part: Part, seed: int) -> Rewritten:
    """One statement attached to a base as when it was applied."""
    draft = Draft(base, part.path, part.parameter)
    site = Site(draft, part, str(step.statement), step.statement.name, step.operation.verb, seed)
    step.operation.rewrite(site)
    step.operation.fill([site], None)
    return draft.finish().eval()


def _moved(place: Place, fresh: Rewritten) -> bool:
    """Whether attaching has replaced a tensor of the base."""
    for name, tensor in place.module.named_parameters(recurse=False):
        if name not in place.module.added and not torch.equal(fresh.get_parameter(name), tensor):
            return True
    return False


def _independent(module: Rewritten, x: Tensor) -> Tensor:
    """The base's output without any of our switches: by the original module, or by the weight that its code reads."""
    original = module.original
    weight = original._parameters.get("weight")
    if weight is not None and weight is module._parameters.get("weight"):
        return first_tensor(original.eval()(x))
    draft = Draft(module, "", "weight")
    wide = draft.evaluate(draft.captured.weight).detach()
    bias = module._parameters.get("bias")
    if draft.captured.product.target is F.embedding:
        return F.embedding(x, wide)  # type: ignore[no-any-return]
    if draft.captured.product.target is linear_as:
        compute = next(each for each in draft.captured.product.args if isinstance(each, torch.dtype))
        return torch.as_tensor(linear_as(x, wide, bias, compute))
    return F.linear(x, wide.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _matrix(module: nn.Module, facts: Facts, subject: Subject, place: Place) -> tuple[Tensor, Tensor, Tensor]:
    """Columns of the (out, in) matrix of what a place computes now, read off its outputs; G(0); and which columns."""
    device = next(module.parameters()).device
    width = facts.shape[0] if facts.lookup else facts.shape[1]
    columns = torch.randperm(width, generator=subject.generator(place.path, "columns"))[:COLUMNS].to(device)
    if facts.lookup:
        rows: Tensor = module(columns)
        return rows.t(), torch.zeros_like(rows[0]), columns
    unit = torch.zeros(len(columns), width, dtype=subject.dtype, device=device)
    unit[torch.arange(len(columns)), columns] = 1
    at_zero: Tensor = module(torch.zeros_like(unit[:1]))[0]
    return (module(unit).double() - at_zero.double()).t(), at_zero, columns


def _matrix_of(folded: nn.Module, module: Rewritten) -> Tensor:
    """(out, in) of a folded module; (width, vocabulary) of a lookup."""
    assert module.facts is not None
    held = folded._parameters["weight"]
    assert held is not None
    weight = held.detach()
    return weight.t() if module.facts.lookup or module.facts.transposed else weight


def _branch(weight: Tensor, module: Rewritten) -> float:
    """s |A| |B| / |W| of whatever is attached: the change of the weight, times the root of the rank that it may have.

    For random A and B, |BA| = |A| |B| / sqrt(r).
    """
    draft = Draft(module, "", "weight")
    base = draft.evaluate(draft.captured.weight).detach().double()
    base = base.t() if base.shape != weight.shape else base
    ranks = [min(p.shape) for name, p in module.named_parameters() if name in module.added and p.dim() > 1]
    size = base.norm().item()
    return (weight.double() - base).norm().item() / size * max(ranks, default=1) ** 0.5 if size else 1.0


def _dtypes(module: Rewritten) -> list[torch.dtype]:
    """Every floating dtype in a place's arithmetic: its tensors' and those that its code names."""
    named = [each for node in module.full.nodes for each in node.args if isinstance(each, torch.dtype)]
    held = [parameter.dtype for parameter in module.parameters()]
    assert module.facts is not None
    return [module.facts.dtype, *(dtype for dtype in (*named, *held) if dtype.is_floating_point)]
