"""Channels of the residual stream cut out of decoders in float64: equal to the whole with them at zero."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import surgery
from surgery.verify.bounds import merge_bound, relative_error
from tests import zoo
from tests.operations.channels import magnitudes, mask, weights_by_channel
from tests.operations.cut import TOKENS, decoder, largest, run, shapes, texts
from tests.reference_decoder import ReferenceDecoder, Shape


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(shape=shapes, share=st.integers(5, 70), seed=st.integers(0, 99))
def test_fewer_channels_equal_those_at_zero(shape: Shape, share: int, seed: int) -> None:
    """To 1e-10 in float64, behind gains that were rescaled; those that stay have the largest sums of |w|."""
    small, whole = decoder(f"prune channels {share}%", shape, seed), decoder("", shape, seed)
    before = run(whole)
    kept = largest(weights_by_channel(whole, magnitudes(whole)), shape.width - round(share / 100 * shape.width))
    assert mask(whole, small) == kept
    assert torch.equal(small.layers[-1].ffn.up.weight, whole.layers[-1].ffn.up.weight[:, kept])
    assert torch.equal(small.layers[0].attention.o.weight, whole.layers[0].attention.o.weight[kept])
    assert small.layers[0].ffn.up.in_features == small.layers[0].ffn.down.out_features == len(kept)
    assert (small.head.weight is small.embed.weight) == shape.tied
    assert (run(small) - run(whole)).abs().max() < 1e-10
    assert torch.equal(before, run(whole)) == (len(kept) == shape.width)


def test_gain_and_eps_make_up_for_the_mean_over_fewer() -> None:
    """gain * sqrt(width / left), eps * width / left: with an eps that matters, and to rounding in float64."""

    def with_eps(program: str) -> ReferenceDecoder:
        model = decoder("")
        for module in model.modules():
            if hasattr(module, "eps"):
                module.eps = 5e-3  # large enough to be seen
        return surgery.apply(surgery.parse(program), model, example_inputs=(TOKENS,)) if program else model

    small, whole = with_eps("prune channels 50% by random"), with_eps("")
    kept = mask(whole, small)
    assert len(kept) == 16
    assert torch.allclose(small.norm.weight, whole.norm.weight[kept] * 2**0.5, rtol=1e-15)
    assert small.layers[0].ffn_norm.eps == 1e-2
    assert (run(small) - run(whole)).abs().max() < 1e-12


def test_scores_by_what_matters_on_texts(tmp_path: Path) -> None:
    """Sensitivity against a plain reference of its formula, over all that belongs to a channel."""
    calibration = [list(range(3, 14)), [5, 9, 5, 9, 40]]
    path = texts(calibration, tmp_path)
    shape = Shape(bias=True, positions="learned")
    whole, small = decoder("", shape), decoder("", shape)
    program = f'prune channels 25% by sensitivity using "{path}"'
    surgery.apply(surgery.parse(program), small, example_inputs=(TOKENS,))
    total = torch.zeros(32, dtype=torch.float64)
    for ids in calibration:
        whole.zero_grad()
        F.cross_entropy(whole(torch.tensor([ids]))[0, :-1], torch.tensor(ids[1:])).backward()
        taylor = {name: (p * p.grad).abs().detach() for name, p in whole.named_parameters() if p.grad is not None}
        total += weights_by_channel(whole, taylor)
    assert largest(weights_by_channel(whole, magnitudes(whole)), 24) != largest(total, 24)
    assert mask(whole, small) == largest(total, 24)


@pytest.mark.parametrize(
    ("program", "width"),
    [("prune channels 50% round to 8", 16), ("prune channels 40% round to 8 nearest", 16), ("prune channels 0%", 32)],
)
def test_a_multiple_is_left_where_it_is_asked_for(program: str, width: int) -> None:
    model = decoder(program)
    assert model.embed.weight.shape == (61, width)
    assert model.layers[1].ffn.down.out_features == width


def test_other_statements_act_on_what_is_left(tmp_path: Path) -> None:
    """With neurons and heads cut as well and an adapter on top: verifies, merges, saves and loads; a second program."""
    lines = ["prune channels 25%", "prune neurons 50% on ffn", "prune heads 50% on attn", "lora rank 2 on all linear"]
    model, other = decoder(" ; ".join(lines)), decoder(" ; ".join(reversed(lines)))
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))
    assert model.get_parameter("layers.1.ffn.down.lora_B").shape == (24, 2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    report = surgery.verify(model, example_inputs=(TOKENS,))
    assert report, str(report)
    assert not report.of("shrunk_equals_masked")[0].skipped
    found = run(model)
    surgery.save(model, tmp_path / "out")
    assert torch.equal(run(surgery.load(tmp_path / "out", model=decoder())), found)
    merged = surgery.merge(model)
    assert (run(merged) - found).abs().max() < 1e-10
    surgery.apply(surgery.parse("prune magnitude 50% on ffn"), merged, example_inputs=(TOKENS,))
    assert int((merged.layers[0].ffn.up.weight == 0).sum()) == 24 * 24 // 2
    assert surgery.verify(merged, example_inputs=(TOKENS,))


def test_experts_are_made_of_the_narrower_blocks() -> None:
    model, narrow = decoder("moe 3 experts on ffn ; prune channels 50%"), decoder("prune channels 50%")
    assert model.layers[0].ffn.router.in_features == 16
    assert (run(model) - run(narrow)).abs().max() < 1e-12


def test_planning_reads_shapes_alone_and_dtypes_and_ties_stay() -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        hollow = AutoModelForCausalLM.from_config(zoo.config("qwen2", num_hidden_layers=2))
    plan = surgery.plan(surgery.parse("prune channels 25%"), hollow)
    assert "20 -> 15 channels" in str(plan)
    assert plan.cost.bytes_after < plan.cost.bytes_before
    assert hollow.model.layers[0].mlp.up_proj.weight.shape == (35, 20)
    model = zoo.tiny("qwen2", dtype=torch.bfloat16, num_hidden_layers=2)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = zoo.logits(model, zoo.padded(model))
    surgery.apply(surgery.parse("prune channels 25%"), model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.layers[0].mlp.up_proj.weight.shape == (35, 15)
    assert not model.model.layers[0].mlp.up_proj.weight.requires_grad
    assert relative_error(zoo.logits(model, zoo.padded(model)), before) > merge_bound(torch.bfloat16) / 100
