"""Masks that cannot move as they should: beside other statements, in part of a projection, on no schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery.errors import GraphError, PlanError, SurgeryError
from tests import studied, zoo
from tests.reference_decoder import reference_decoder
from tests.refusals import assert_refused
from tests.training.wide import FED, RIGL, WIDE, applied


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("sparse static 90% on ffn\nfreeze ffn.up", "S115", "freeze ffn.up"),
        ("sparse static 90% on ffn\nquantize base nf4", "S114", "quantize base nf4"),
        ("sparse static 90% on ffn\nprune magnitude 50% on ffn.up", "S103", "prune magnitude 50%"),
        ("lottery 90% rounds 2 on ffn\nsparse rigl 50% on ffn.up", "S103", "sparse rigl 50%"),
        ("lora rank 2 init pissa on ffn\nsparse rigl 50% on ffn.up", "S103", "sparse rigl 50%"),
        ("sparse static 99.99% on ffn", "S117", "sparse static 99.99%"),
    ],
)
def test_what_does_not_go_together(text: str, code: str, said: str) -> None:
    assert_refused(text, reference_decoder(WIDE), code, said, PlanError, example_inputs=FED)


def test_a_fused_projection_is_masked_whole() -> None:
    model = zoo.tiny("gpt2")
    for text in (
        "sparse static 50% on attn.q",
        "lottery 50% rounds 1 on attn.q",
        "prune magnitude 0% to 9% over 100 steps on attn.q",
    ):
        with pytest.raises(PlanError, match="select it whole"):
            surgery.plan(surgery.parse(text), model, anatomy=studied.anatomy("gpt2"))
    assert surgery.plan(surgery.parse("sparse static 50% on attn.q,k,v"), model, anatomy=studied.anatomy("gpt2")).places


def test_schedules_that_cannot_be_kept() -> None:
    def code(of: Any) -> str:
        with pytest.raises(SurgeryError) as refused:
            of()
        assert isinstance(refused.value, GraphError)
        return refused.value.diagnostics[0].code

    def optimizer(model: nn.Module) -> Any:
        return torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad] or [nn.Parameter(torch.ones(1))], lr=0.1
        )

    plain, adapted, share = reference_decoder(WIDE), applied("ia3"), applied("sparse rigl 80% every 5 steps on ffn")
    assert code(lambda: surgery.schedule(plain, optimizer(plain))) == "S370"
    assert code(lambda: surgery.schedule(adapted, optimizer(adapted))) == "S372"
    assert code(lambda: surgery.schedule(share, optimizer(share))) == "S373"
    assert code(lambda: surgery.schedule(share, optimizer(share), steps=6)) == "S373"
    assert code(lambda: surgery.schedule(share, optimizer(plain), steps=60)) == "S374"
    assert code(lambda: surgery.lottery(plain, lambda *_: None)) == "S370"
    assert code(lambda: surgery.lottery(share, lambda *_: None)) == "S372"
    model = applied(RIGL)
    eager = surgery.schedule(model, optimizer(model))
    eager.step()
    assert code(eager.step) == "S374"  # no backward pass has been
