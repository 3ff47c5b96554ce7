"""Modules with a forward of their own: rewritten as what they compute, or refused, never taken for another."""

from __future__ import annotations

import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import surgery
from surgery.errors import GraphError, SurgeryError
from surgery.graph.affine import NotAffine
from surgery.graph.fold import fold
from surgery.graph.module import Rewritten, added_parameters, switched
from surgery.operations.lora import Lora
from surgery.operations.prune import Prune
from surgery.operations.quantize import Quantize
from surgery.verify.bounds import relative_error
from tests.graph.forwards import (
    FED,
    AtSign,
    ByHeads,
    ChildDropout,
    FirstFour,
    FunctionalDropout,
    HalfTheBias,
    InOut,
    Matmul,
    MatmulAlone,
    OneMore,
    Residual,
    Turned,
    TwiceTheProduct,
    applied,
    decoder,
)
from tests.graph.rewriting import holder, rewrite
from tests.trained import trained

LOOKALIKES = {
    "plus one": OneMore,
    "plus the input": lambda: Residual(6, 6),
    "alpha": TwiceTheProduct,
    "beta": HalfTheBias,
    "first four": FirstFour,
    "by heads": ByHeads,
}


@pytest.mark.parametrize("name", LOOKALIKES)
def test_what_only_looks_like_a_plain_map_is_taken_for_what_it_is(name: str) -> None:
    """identity_at_init and merges: the same bits at first, the trained function after a merge, or a refusal."""
    torch.manual_seed(0)
    module, x = LOOKALIKES[name](), torch.randn(2, 3, 6)
    wanted = module(x).detach()
    try:
        made = rewrite(module, Lora(rank=2))
    except GraphError as error:
        assert {each.code for each in error.diagnostics} <= {"S301", "S302"}  # noqa: PT017
        assert torch.equal(module(x), wanted)
        return
    assert torch.equal(made(x), wanted)
    for parameter in added_parameters(holder(made)).values():
        parameter.data.normal_()
    moved = made(x).detach()
    assert relative_error(moved, wanted) > 1e-2
    try:
        merged = fold(made)
    except NotAffine:
        merged = made
    assert merged(x).shape == moved.shape
    assert relative_error(merged(x), moved) <= 1e-5


def test_a_forward_set_on_the_instance_is_refused() -> None:
    """Error: the class's forward is not what such a module computes; no adapter goes where the base would change."""
    model = decoder(nn.Linear)
    module = model.blocks[1].lift
    module.forward = types.MethodType(lambda self, x: F.linear(x, self.weight * 3, self.bias), module)
    wanted = model(*FED).detach()
    with pytest.raises(SurgeryError) as caught:
        applied("lora rank 2 on ffn.up", model)
    assert {each.code for each in caught.value.diagnostics} == {"S301"}
    assert "blocks.1.lift" in str(caught.value)
    assert torch.equal(model(*FED), wanted)
    assert not any(isinstance(each, Rewritten) for each in model.modules())


PROGRAMS = (
    "lora rank 2 on ffn.up",
    "lora rank 2 dora on ffn.up",
    "lora rank 2 init pissa on ffn.up",
    "prune magnitude 50% on ffn.up",
    "prune magnitude 2:4 on ffn.up",
    "quantize ffn.up nf4",
    "quantize ffn.up nf4 compute fp32",
    "quantize ffn.up int8",
)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("kind", [Matmul, MatmulAlone, Turned, AtSign])
def test_every_method_knows_an_in_out_weight(kind: type[InOut], program: str) -> None:
    """identity_at_init, exact_sparsity and merges hold for matmul(x, weight) as they do for F.linear(x, weight)."""
    base = decoder(kind, width=24)
    before = base(*FED).detach()
    weights = [block.lift.weight.detach().clone() for block in base.blocks]
    model = applied(program, base)
    start = model(*FED).detach()
    if program.startswith("lora"):
        assert relative_error(start, before) <= 1e-5
        with surgery.disabled(model):
            assert "pissa" in program or torch.equal(model(*FED), before)
        moved = trained(model)(*FED).detach()
        assert relative_error(moved, start) > 1e-3
    else:
        moved = start
        assert 1e-3 < relative_error(start, before) < 1
    surgery.merge(model)
    assert relative_error(model(*FED).detach(), moved) <= 1e-5
    for block, weight in zip(model.blocks, weights, strict=True):
        assert type(block.lift) is kind
        merged = block.lift.weight.detach()
        assert merged.shape == weight.shape
        if "50%" in program:
            assert int((merged == 0).sum()) == round(0.5 * weight.numel())
            assert merged.abs().sum() > 0.7 * weight.abs().sum(), "the smallest are what goes"
        if "2:4" in program:
            groups = merged.t().unflatten(-1, (-1, 4))
            assert bool(((groups != 0).sum(-1) == 2).all()), "two of four neighbours along the input stay"
        if "prune" in program:
            assert torch.equal(merged[merged != 0], weight[merged != 0])


def test_dora_starts_from_the_norms_of_the_outputs_also_for_in_out_weights() -> None:
    """dora: the magnitude is one number for each output, the norm of its weights."""
    torch.manual_seed(0)
    module = Matmul()
    norms = torch.linalg.vector_norm(module.weight.detach(), dim=0)
    made = rewrite(module, Lora(rank=2, dora=True))
    torch.testing.assert_close(made.get_parameter("a0_lora_magnitude").detach(), norms)


def test_a_mode_that_a_trace_would_freeze_is_refused() -> None:
    """Error: dropout that reads `self.training` in the forward would stay on, or off, for ever."""
    for mode in (True, False):
        model = decoder(FunctionalDropout).train(mode)
        with pytest.raises(SurgeryError) as caught:
            applied("lora rank 2 on ffn.up", model)
        assert {each.code for each in caught.value.diagnostics} == {"S301"}
        assert "blocks.0.lift" in str(caught.value)
        assert not any(isinstance(each, Rewritten) for each in model.modules())


@pytest.mark.parametrize("captured", [True, False])
def test_a_child_that_drops_follows_the_mode(captured: bool) -> None:
    """identity_at_init: in training the same entries are dropped as before, in evaluation none."""
    model, plain = decoder(ChildDropout), decoder(ChildDropout)
    applied("lora rank 2 on ffn.up", model.train(captured))
    assert sum(isinstance(each, Rewritten) for each in model.modules()) == 3
    assert torch.equal(model.eval()(*FED), plain(*FED))
    drawn = []
    for each in (model, plain):
        torch.manual_seed(3)
        drawn.append(each.train()(*FED).detach())
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], plain.eval()(*FED))


def test_branches_on_a_matmul_can_be_switched_off() -> None:
    """off_means_off: the base to the bit, under codes and masks too."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8)
    operations = (Prune(score="magnitude", amount=0.5), Quantize(format="nf4"))
    base = rewrite(Matmul(8, 9), *operations)
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8)
    both = rewrite(Matmul(8, 9), *operations, Lora(rank=2))
    for name in ("a2_lora_A", "a2_lora_B"):
        both.get_parameter(name).data.normal_()
    wanted = base(x)
    assert not torch.allclose(both(x), wanted)
    with switched(holder(both), {None}):
        assert torch.equal(both(x), wanted)
