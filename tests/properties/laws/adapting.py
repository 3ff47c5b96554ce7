"""Laws of what is attached: its start, its switch, its formula, its merge."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.graph.module import rewritten
from surgery.language.program import Program
from surgery.operations.freeze import Freeze
from surgery.operations.lora import Lora
from surgery.operations.prune import Prune
from surgery.operations.quantize import Quantize
from surgery.operations.sparse import Sparse
from surgery.operations.train import Train
from surgery.verify.bounds import merge_bound
from tests import strategies
from tests.properties import hand
from tests.properties.case import Case, Law, randomise
from tests.properties.drawn import (
    FLOATS,
    WIDE,
    budgets,
    cases,
    exact,
    from_weights,
    kept,
    merging,
    narrow,
    plain_loras,
    rescaled,
)


def identity_at_the_start(case: Case) -> None:
    model = case.apply()
    on = case.run(model)
    with surgery.disabled(model):
        assert torch.equal(case.run(model), on)
    if not case.has(Prune, Sparse, Quantize):
        assert torch.equal(case.run(case.build()), on)
    before = on
    randomise(model)
    assert not torch.equal(case.run(model), before), "what was attached has no effect"


def off_means_off(case: Case) -> None:
    model = case.apply()
    randomise(model)
    on = case.run(model)
    with surgery.disabled(model):
        off = case.run(model)
    assert not torch.equal(on, off)
    assert torch.equal(case.run(model), on)
    base = [s for s in case.program.statements if isinstance(s.operation, Prune | Sparse | Quantize | Train | Freeze)]
    alone = case.apply(Program(tuple(base), seed=case.program.seed)) if base else case.build()
    with torch.no_grad():  # what is trained of the base stays as trained
        for name, tensor in surgery.parameters(alone).items():
            tensor.copy_(surgery.parameters(model)[name])
    assert torch.equal(case.run(alone), off)


def adapters_mean_their_formula(case: Case) -> None:
    """The whole model against a plain one whose weights were computed by hand from the paper."""
    model = case.apply()
    tensors = randomise(model)
    wanted = case.run(hand.adapted(case.build(), case.program, tensors))
    error = (case.run(model) - wanted).abs().max() / wanted.abs().max()
    depth = 7 * case.model.layers
    assert error <= merge_bound(torch.float64, depth, 16.0), f"off by {error:.1e}"


def bottlenecks_mean_their_formula(case: Case) -> None:
    """Adapters against sub-layers with the networks around them, written out; twice, for what is kept in between."""
    model = case.apply()
    written = hand.narrowed(case.build(), case.program, randomise(model))
    for tokens in (case.model.tokens, case.model.tokens.flip(1)):
        wanted = case.run(written, tokens)
        error = (case.run(model, tokens) - wanted).abs().max() / wanted.abs().max()
        bound = merge_bound(torch.float64, 7 * case.model.layers, 64.0)
        assert error <= bound, f"off by {error:.1e}"
    assert not torch.equal(case.run(case.build(), tokens), wanted)


def merging_changes_nothing(case: Case) -> None:
    model = case.apply()
    randomise(model)
    wanted = case.run(model)
    with surgery.disabled(model):
        assert not torch.equal(case.run(model), wanted)
    places = sum(1 for _ in rewritten(model))
    dtype = strategies.DTYPES[case.model.dtype]
    merged = surgery.merge(model)
    assert not list(rewritten(merged))
    assert merged.state_dict().keys() == case.build().state_dict().keys()
    error = ((case.run(merged) - wanted).abs().max() / wanted.abs().max()).item()
    assert error <= merge_bound(dtype, max(places, 1), 16.0), f"off by {error:.1e}"


def merged_weights_mean_their_formula(case: Case) -> None:
    """Folded weights and biases against W + s B A by hand in float64: summed in float32 at least, then rounded once."""
    model = case.apply()
    tensors = {name: tensor.detach().double() for name, tensor in randomise(model).items()}
    wanted = hand.adapted(case.build().double(), case.program, tensors).state_dict()
    found = surgery.merge(model).state_dict()
    assert found.keys() == wanted.keys()
    assert any(not torch.equal(found[name], tensor) for name, tensor in case.build().state_dict().items())
    for name, tensor in wanted.items():
        dtype = found[name].dtype
        summed = torch.promote_types(dtype, torch.float32)
        rounding = torch.finfo(dtype).eps / 2 * tensor.abs()
        bound = rounding + 64 * torch.finfo(summed).eps * tensor.abs().max().clamp_min(1.0)
        assert bool(((found[name].double() - tensor).abs() <= bound).all()), name


def factors_mean_their_formula(case: Case) -> None:
    """IA3 and added biases against a plain model whose weights were computed by hand, whole and merged."""
    model = case.apply()
    tensors = randomise(model)
    wanted = case.run(hand.rescaled(case.build(), case.program, tensors))
    bound = merge_bound(torch.float64, 7 * case.model.layers, 16.0)
    for each in (model, surgery.merge(copy.deepcopy(model))):
        error = (case.run(each) - wanted).abs().max() / wanted.abs().max()
        assert error <= bound, f"off by {error:.1e}"
    assert not torch.equal(case.run(case.build()), wanted)


def starts_are_the_nearest(case: Case) -> None:
    """LoftQ wins back all that its rank can of what its codes lose, in one turn what codes alone do; PiSSA leaves
    them the rest of the weight, of which they lose what they would of any weight.

    That they lose less of that rest than of the whole is so of most matrices, and not of every small one. Where several
    parts of one matrix start so, codes of the first are made once more with those of the next (blocks and their scales
    reach over both): there it is the least that can be lost.
    """
    quantize, adapter = case.program.statements
    lora: Any = adapter.operation
    model = case.apply()
    merged, held = _weights(model), _weights(model, adapted=False)
    base, rest = case.build(), case.build()
    alone = _weights(case.apply(Program((quantize,))))
    for name, weight in rest.named_parameters():
        weight.data -= merged[name] - held[name]
    left = _weights(case.apply(Program((quantize,)), copy.deepcopy(rest)))
    parts = [part for step in case.plan().steps if isinstance(step.operation, Lora) for part in step.parts]
    for part in parts:
        name = f"{part.path}.weight"
        rows = torch.cat([torch.arange(*run) for run in part.channels or ((0, part.shape[0]),)])
        weight = base.get_parameter(name).detach()[rows]
        lost = (merged[name][rows] - weight).norm()
        if lora.init == "pissa":
            wanted = (left[name] - rest.get_parameter(name))[rows].norm()
            assert (merged[name] - held[name])[rows].norm() > 0.1 * weight.norm(), "the adapter has no effect"
        else:
            wanted = torch.linalg.svdvals(weight - held[name][rows])[lora.rank :].norm()
            assert lora.init.value > 1 or lost < (alone[name][rows] - weight).norm()
        slack = torch.finfo(torch.float32).eps * weight.norm()  # the widest that becomes codes
        exact = lora.init == "pissa" or [other.path for other in parts].count(part.path) == 1
        assert lost >= wanted - slack, f"{lost:.3e} of {name} is lost, less than its rank can"
        assert not exact or lost <= wanted + slack, f"{lost:.3e} of {name} is lost, and not {wanted:.3e}"


@torch.no_grad()
def _weights(model: nn.Module, adapted: bool = True) -> dict[str, Tensor]:
    """Merged, or what codes hold alone."""
    model = copy.deepcopy(model)
    for name, tensor in surgery.parameters(model).items():
        if "lora_B" in name and not adapted:
            tensor.zero_()
    return {name: tensor.detach() for name, tensor in surgery.merge(model).named_parameters()}


def budgets_are_kept_and_used(case: Case) -> None:
    """No more than the share, by count; one more for every matrix would be too much. Or even rank 1 is, and says so."""
    (statement,) = case.program.statements
    budget: Any = statement.operation
    total = sum(parameter.numel() for parameter in case.build().parameters())
    shapes = {}
    for spot in hand.spots(statement.selector, case.model.shape):
        path, rows, _ = hand.place(spot, case.model.shape)
        weight: Any = case.build().get_submodule(path).weight[rows]
        shapes[spot] = tuple(weight.shape)

    def spent(rank: int) -> float:
        count = sum(min(rank, *shape) * sum(shape) for shape in shapes.values())
        return count / (total + count)

    if spent(1) > budget.budget:
        with pytest.raises(surgery.SurgeryError, match="S118"):
            case.plan()
        return
    model = case.apply()
    tensors = surgery.parameters(model)
    trained = sum(tensor.numel() for tensor in tensors.values())
    assert trained / (total + trained) <= budget.budget
    equal = min(tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name)
    most = max(tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name)
    assert spent(most + 1) > budget.budget or most == max(min(shape) for shape in shapes.values())
    assert most - equal <= 1 or equal == min(min(shape) for shape in shapes.values())


LAWS: tuple[Law, ...] = (
    Law("identity", "what is attached changes no bit at the start", identity_at_the_start, cases(exact, FLOATS), 2),
    Law("off", "switched off, the base comes back to the bit", off_means_off, cases(kept, FLOATS), 2),
    Law("formula", "adapters compute W x + s B A x", adapters_mean_their_formula, cases(plain_loras)),
    Law("bottlenecks", "adapters on edges are what they say", bottlenecks_mean_their_formula, cases(narrow)),
    Law("merge", "merged equals unmerged within the bound", merging_changes_nothing, cases(merging, WIDE), 2),
    Law("merged weights", "a merge gives W + s B A", merged_weights_mean_their_formula, cases(plain_loras, FLOATS)),
    Law("factors", "ia3 and added biases are what they say", factors_mean_their_formula, cases(rescaled), 2),
    Law(
        "starts near",
        "an adapter from the weight wins back what its rank can of what codes lose",
        starts_are_the_nearest,
        cases(from_weights),
        2,
    ),
    Law("budgets", "ranks cost what a budget allows, and no less", budgets_are_kept_and_used, cases(budgets)),
)
