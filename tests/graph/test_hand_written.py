"""Attention written by hand in any of its usual ways takes prefixes and prompts, with the fused call's numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import surgery
from tests.graph.hand_written import FORMS, HEADS, Attention, Fused, SharedFused, decoder
from tests.properties.case import randomise

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])
PROGRAMS = (
    "prefix 3 on all layers",
    "prefix 3 gated on layers 1",
    "prefix 2 via mlp 5 on all layers ; lora rank 2 on attn.q,v",
    "prompt 3",
    "adapter bottleneck 3 after attn ; ia3",
)


def changed(form: type[Attention], program: str) -> Any:
    model = surgery.apply(program_of(program), decoder(form), example_inputs=(TOKENS,))
    randomise(model)
    return model


def program_of(text: str) -> Any:
    return surgery.parse(text)


def run(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS)  # type: ignore[no-any-return]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_same_anatomy_as_the_fused_call(form: type[Attention]) -> None:
    fused = SharedFused if form.shared else Fused
    found, wanted = (surgery.study(decoder(each), example_inputs=(TOKENS,)) for each in (form, fused))
    assert str(found) == str(wanted)
    assert "attn.q" in str(found)
    assert f"{HEADS} heads" in str(found)
    assert "decoder layers 0..1" in str(found)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_same_numbers_as_the_fused_call(form: type[Attention], program: str) -> None:
    base = run(decoder(form))
    model, wanted = changed(form, program), run(changed(SharedFused if form.shared else Fused, program))
    assert (run(model) - wanted).abs().max() < 1e-12 * wanted.abs().max()
    assert (run(model) - base).abs().max() > 1e-3 * base.abs().max(), "the program has no effect"
    assert torch.equal(run(copy.deepcopy(model)), run(model))
    with surgery.disabled(model):
        assert torch.equal(run(model), base), "the base comes back to the bit"
    assert surgery.verify(model, example_inputs=(TOKENS,))
    merged = surgery.merge(model)
    assert (run(merged) - wanted).abs().max() < 1e-12 * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_a_gate_changes_no_bit_at_the_start(form: type[Attention], dtype: torch.dtype) -> None:
    base = run(decoder(form, dtype))
    model = surgery.apply(program_of("prefix 3 gated on all layers"), decoder(form, dtype), example_inputs=(TOKENS,))
    assert torch.equal(run(model), base)
    randomise(model)
    assert not torch.equal(run(model), base)


def test_tracing_leaves_nothing_in_the_model() -> None:
    from tests.graph.hand_written import Constants

    model = decoder(Constants)
    before = {path: set(vars(module)) for path, module in model.named_modules()}
    surgery.plan(program_of("prefix 3 on all layers"), model, example_inputs=(TOKENS,))
    assert {path: set(vars(module)) for path, module in model.named_modules()} == before
    made = surgery.apply(program_of("prefix 3 on all layers"), model, example_inputs=(TOKENS,))
    constants = [name for name in dict(made.named_buffers()) if "constant" in name]
    assert constants
    assert not set(constants) & set(made.state_dict()), "numbers of the code are not saved"
