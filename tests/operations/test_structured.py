"""Neurons and heads cut out: what is left equals the masked whole, keeps caches, loads without us."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from surgery.graph import cutting
from surgery.verify.bounds import merge_bound, relative_error
from tests import zoo
from tests.operations.cut import TOKENS, decoder, generates_alike, largest, loaded_again, run, shapes, texts
from tests.reference_decoder import Shape

CALIBRATION = [list(range(3, 14)), list(range(20, 29)), [5, 9, 5, 9, 40]]


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    return texts(CALIBRATION, tmp_path)


def neuron_scores(ffn: Any) -> Tensor:
    """Sum |w| of each neuron's rows, biases and column."""
    score = ffn.down.weight.abs().sum(0)
    for way in filter(None, (ffn.up, ffn.gate)):
        score = score + way.weight.abs().sum(1) + (0 if way.bias is None else way.bias.abs())
    return score


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(shape=shapes, share=st.integers(5, 70), seed=st.integers(0, 99))
def test_fewer_neurons_equal_those_at_zero(shape: Shape, share: int, seed: int) -> None:
    """To 1e-10 in float64; those that stay have the largest sums of |w|, counted by hand."""
    small, whole = decoder(f"prune neurons {share}% on ffn", shape, seed), decoder("", shape, seed)
    before = run(whole)
    stay = shape.ffn - round(share / 100 * shape.ffn)
    for layer, left in zip(whole.layers, small.layers, strict=True):
        kept = largest(neuron_scores(layer.ffn), stay)
        gone = sorted(set(range(shape.ffn)) - set(kept))
        with torch.no_grad():
            layer.ffn.down.weight[:, gone] = 0
        assert torch.equal(left.ffn.up.weight, layer.ffn.up.weight[kept])
        assert torch.equal(left.ffn.down.weight, layer.ffn.down.weight[:, kept])
        assert (left.ffn.up.out_features, left.ffn.down.in_features) == (stay, stay)
    assert (run(small) - run(whole)).abs().max() < 1e-10
    assert torch.equal(before, run(whole)) == (stay == shape.ffn)


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(shape=shapes, data=st.data(), seed=st.integers(0, 99))
def test_fewer_heads_equal_those_at_zero(shape: Shape, data: st.DataObject, seed: int) -> None:
    """Whole key-value groups, or as many query heads of each: to 1e-10 in float64, whichever they are."""
    groups, each = shape.key_value_heads, shape.heads // shape.key_value_heads
    query = groups == 1 or (each > 1 and data.draw(st.booleans()))
    units = each if query else groups
    gone = data.draw(st.integers(1, units - 1))
    program = f"prune heads {100 * gone / units}% {'query ' if query else ''}by random on attn"
    small, whole = decoder(program, shape, seed), decoder("", shape, seed)
    width = shape.head_width
    for layer, left in zip(whole.layers, small.layers, strict=True):
        old, new = layer.attention.o.weight, left.attention.o.weight
        columns = [next(i for i in range(old.shape[1]) if torch.equal(old[:, i], column)) for column in new.t()]
        kept = sorted({column // width for column in columns})
        assert columns == [head * width + i for head in kept for i in range(width)]
        assert len(kept) == shape.heads - gone * (groups if query else each)
        per_group = [sum(head // each == group for head in kept) for group in range(groups)]
        assert set(per_group) == ({each - gone} if query else {0, each})
        with torch.no_grad():
            cut = [column for column in range(old.shape[1]) if column not in columns]
            old[:, cut] = 0
        assert left.attention.heads == len(kept)
        assert left.attention.key_value_heads == (groups if query else groups - gone)
    assert (run(small) - run(whole)).abs().max() < 1e-10


# Family, program, whether a configuration can say it.
CUTS = [
    ("llama", "prune neurons 30% on ffn", True),
    ("llama", "prune heads 50% on attn", True),
    ("gpt2", "prune heads 33% nearest on attn", False),
]
MORE = [
    ("t5", "prune heads 25% on attn + cross", True),
    ("phi3", "prune heads 40% on attn ; prune neurons 20% on ffn", False),
    *((family, "prune neurons 40% on ffn", True) for family in zoo.FAMILIES if family != "llama"),
    ("llama", "prune heads 50% query on attn", True),
    ("qwen2", "prune heads 40% on attn", True),
    ("gemma", "prune heads 33% nearest on attn", True),
    ("gpt_neox", "prune heads 33% nearest on attn", False),
    ("opt", "prune heads 50% on attn", False),
    ("bert", "prune heads 33% nearest on attn", False),
    ("llama", "prune neurons 30% on ffn in layers 0", False),
    ("t5", "prune heads 25% on attn in encoder", False),
    ("phi3", "prune heads 40% on attn in layers 1", False),
]


@pytest.mark.parametrize(
    ("family", "program", "said"), [*CUTS, *(pytest.param(*each, marks=pytest.mark.slow) for each in MORE)]
)
def test_transformers_models_equal_the_masked_ones(family: str, program: str, said: bool, tmp_path: Path) -> None:
    """To rounding in float32, to 1e-10 in float64; `generate` with cache agrees; loads without us where it can."""
    deep = {"num_layers": 3} if family == "t5" else {}  # T5's own caches are as deep as its encoder
    small, whole = zoo.tiny(family, **deep), zoo.tiny(family, **deep)
    fed = zoo.inputs(whole)
    base = zoo.logits(whole, fed)
    plan = surgery.plan(surgery.parse(program), small)
    assert f"`{'from_pretrained' if said else 'surgery.load'}` builds the new shape" in str(plan)
    surgery.apply(plan, small)
    mask(whole, small)
    found, wanted = zoo.logits(small, fed), zoo.logits(whole, fed)
    assert relative_error(found, wanted) <= merge_bound(torch.float32, depth=3)
    assert not torch.allclose(found, base, atol=1e-3)
    exact = [zoo.logits(copy.deepcopy(model).double(), fed) for model in (small, whole)]
    assert relative_error(*exact) <= 1e-10
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in whole.parameters())
    if family != "bert":
        generates_alike(small, whole, fed)
    report = surgery.verify(small)
    assert report
    assert "shrunk_equals_masked" in report.promises()
    assert not report.of("shrunk_equals_masked")[0].skipped
    assert (loaded_again(small, fed, tmp_path / "out") is not None) == said


@torch.no_grad()
def mask(whole: nn.Module, small: nn.Module) -> None:
    """Zero what a smaller model reads no more: the columns of the whole's matrices that its own have not."""
    for path, module in whole.named_modules():
        weight = module._parameters.get("weight")
        left = small.get_submodule(path)._parameters.get("weight")
        if weight is None or left is None or weight.dim() != 2 or isinstance(module, nn.Embedding):
            continue
        conv = type(module).__name__ == "Conv1D"
        wide, narrow = (weight, left) if conv else (weight.t(), left.t())  # (in, out)
        if wide.shape[1] != narrow.shape[1] or wide.shape[0] == narrow.shape[0]:
            continue
        gone = [row for row in range(len(wide)) if not bool((narrow == wide[row]).all(1).any())]
        assert len(gone) == len(wide) - len(narrow)
        wide[gone] = 0


def _seeing(seen: list[Tensor]) -> Any:
    return lambda module, args: seen.append(args[0])


def test_scores_by_what_matters_on_texts(calibration: Path) -> None:
    """Sensitivity and activation against a plain reference of their formulas."""
    for by in ("sensitivity", "activation"):
        whole = decoder("", Shape(bias=True))
        small = decoder("", Shape(bias=True))
        program = f'prune neurons 50% by {by} using "{calibration}" on ffn'
        surgery.apply(surgery.parse(program), small, example_inputs=(TOKENS,))
        sums = [torch.zeros(48, dtype=torch.float64) for _ in whole.layers]
        for ids in CALIBRATION:
            seen: list[Tensor] = []
            handles = [layer.ffn.down.register_forward_pre_hook(_seeing(seen)) for layer in whole.layers]
            logits = whole(torch.tensor([ids]))
            for handle in handles:
                handle.remove()
            whole.zero_grad()
            F.cross_entropy(logits[0, :-1], torch.tensor(ids[1:])).backward()
            for total, layer, x in zip(sums, whole.layers, seen, strict=True):
                if by == "activation":
                    total += x[0].abs().mean(0).square().detach()
                    continue
                taylor = {name: (p * p.grad).abs().detach() for name, p in layer.ffn.named_parameters()}
                total += taylor["down.weight"].sum(0) + sum(
                    taylor[f"{way}.weight"].sum(1) + taylor[f"{way}.bias"] for way in ("up", "gate")
                )
        for total, layer, left in zip(sums, whole.layers, small.layers, strict=True):
            kept = largest(total, 24)
            assert torch.equal(left.ffn.up.weight, layer.ffn.up.weight[kept])


def test_random_units_follow_the_seed() -> None:
    first, again, other = (
        decoder(f"seed {seed} ; prune neurons 50% by random on ffn").layers[0].ffn.up.weight for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_of_equal_neurons_the_first_ones_go() -> None:
    model = decoder()
    with torch.no_grad():
        for way in (
            model.layers[0].ffn.up.weight,
            model.layers[0].ffn.gate.weight,
            model.layers[0].ffn.down.weight.t(),
        ):
            way.copy_(torch.ones_like(way))
            way[7] = 0.5
    marked = model.layers[0].ffn.down.weight
    with torch.no_grad():
        marked[0] = torch.where(torch.arange(48) % 2 == 0, 1.0, -1.0)
    surgery.apply(surgery.parse("prune neurons 25% on ffn in layers 0"), model, example_inputs=(TOKENS,))
    expected = [*range(12, 48)]  # the small one, and eleven of the first
    assert model.layers[0].ffn.down.weight[0].tolist() == [1.0 if index % 2 == 0 else -1.0 for index in expected]
    assert model.layers[1].ffn.up.out_features == 48


def test_other_statements_act_on_what_is_left(calibration: Path, tmp_path: Path) -> None:
    """Plans, applies in any order to the same bits, verifies, merges, saves and loads."""
    lines = [
        "prune neurons 50% on ffn",
        f'prune heads 50% by activation using "{calibration}" on attn',
        "prune magnitude 50% on ffn",
        "lora rank 2 on all linear",
    ]
    model, other = decoder(" ; ".join(lines)), decoder(" ; ".join(reversed(lines)))
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))
    assert model.get_parameter("layers.1.ffn.up.lora_B").shape == (24, 2)
    assert model.get_parameter("layers.1.ffn.down.lora_A").shape == (2, 24)
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
    surgery.save(merged, tmp_path / "merged")
    again = surgery.load(tmp_path / "merged", model=decoder())
    assert torch.equal(run(again), run(merged))
    assert again.layers[0].ffn.up.weight.shape == (24, 32)


def test_dtypes_flags_and_ties_stay() -> None:
    model = zoo.tiny("qwen2", dtype=torch.bfloat16)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    surgery.apply(surgery.parse("prune neurons 40% on ffn"), model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.layers[0].mlp.up_proj.weight.shape == (21, 20)


@pytest.mark.slow
def test_some_layers_of_a_real_decoder_in_bfloat16(smollm2: Any) -> None:
    """Thirty layers in 16 bits round single logits by a tenth of the largest: no reason to refuse the cut."""
    before = zoo.logits(smollm2, zoo.inputs(smollm2))
    surgery.apply(surgery.parse("prune neurons 25% on ffn in layers 0..14"), smollm2)
    widths = [layer.mlp.up_proj.out_features for layer in smollm2.model.layers]
    assert widths == [1152] * 15 + [1536] * 15
    assert not torch.equal(zoo.logits(smollm2, zoo.inputs(smollm2)), before)


@pytest.mark.slow
def test_a_wrong_cut_of_a_real_decoder_is_seen_in_bfloat16(smollm2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = cutting.narrow

    def wrong(model: Any, cuts: Any) -> None:
        narrow(model, cuts)
        weight = model.model.layers[9].mlp.down_proj.weight
        weight.data = weight.data.roll(1, 1)

    monkeypatch.setattr(cutting, "narrow", wrong)
    with pytest.raises(surgery.SurgeryError, match="S332"):
        surgery.apply(surgery.parse("prune neurons 25% on ffn in layers 0..14"), smollm2)
