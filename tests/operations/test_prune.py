"""Exact counts, ties by position, nesting masks, patterns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import surgery
from surgery.graph.functions import pack_bits, unpack_bits
from surgery.operations.options import Ratio
from surgery.operations.prune import largest, pattern
from surgery.operations.prune_global import kept_of_all, widest
from tests import zoo


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(0, 99))
def test_exactly_as_many_go_as_were_asked(rows: int, columns: int, share: float, seed: int) -> None:
    """exact_sparsity: round(share * count), also among many ties, of which the first go."""
    score = torch.randint(0, 4, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()
    keep = largest(score, share)
    assert int((~keep).sum()) == round(share * score.numel())
    if keep.any() and not keep.all():
        assert score[~keep].max() <= score[keep].min()
        edge = score[~keep].max()
        ties = keep.flatten()[(score == edge).flatten()]
        assert torch.equal(ties, ties.sort().values), "of equal scores the ones that come first go"


SCORES = st.sampled_from([-1.0, 0.0, 1e-42, 0.25, 0.25 + 2**-24, 0.5, 1.0, 3e38, float("inf")])


@given(
    st.lists(st.lists(SCORES, min_size=1, max_size=40), min_size=1, max_size=5),
    st.floats(0, 1),
    st.lists(st.booleans(), min_size=5, max_size=5),
)
def test_ranking_one_by_one_is_ranking_all_at_once(values: list[list[float]], share: float, wide: list[bool]) -> None:
    """Histograms cut what sorting everything in one piece cuts: ties over several tensors, float64 among float32."""
    scores = [
        torch.tensor(each, dtype=torch.float64 if double else torch.float32)
        for each, double in zip(values, wide, strict=False)
    ]
    dtype = widest(score.dtype for score in scores)
    found = list(kept_of_all(lambda: scores, share, dtype))
    assert [keep.shape for keep in found] == [score.shape for score in scores]
    assert torch.equal(torch.cat(found), largest(torch.cat([score.to(dtype) for score in scores]), share))


@given(st.integers(1, 300), st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
def test_a_larger_share_cuts_what_a_smaller_cut(count: int, a: float, b: float, seed: int) -> None:
    """Monotone: the survivors of the larger share survive the smaller one."""
    score = torch.randint(0, 9, (count,), generator=torch.Generator().manual_seed(seed)).float()
    less, more = largest(score, min(a, b)), largest(score, max(a, b))
    assert bool((less | ~more).all())


@given(st.integers(1, 9), st.integers(1, 6), st.integers(2, 7), st.integers(0, 99))
def test_patterns_keep_so_many_of_every_group(rows: int, groups: int, whole: int, seed: int) -> None:
    """N:M: every group of neighbours keeps its N largest."""
    score = torch.rand(rows, groups * whole, generator=torch.Generator().manual_seed(seed))
    part = 1 + seed % (whole - 1) if whole > 2 else 1
    keep = pattern(score, Ratio(part, whole)).unflatten(-1, (groups, whole))
    assert bool((keep.sum(-1) == part).all())
    scores = score.unflatten(-1, (groups, whole))
    kept = scores.masked_fill(~keep, 2).amin(-1)
    assert bool((scores.masked_fill(keep, -1).amax(-1) < kept).all())


@given(st.integers(1, 70), st.integers(0, 99))
def test_bits_are_kept(count: int, seed: int) -> None:
    """Masks are stored as bits, and come back as they were."""
    mask = torch.rand(count, generator=torch.Generator().manual_seed(seed)) > 0.5
    bits = pack_bits(mask)
    assert bits.numel() == -(-count // 8)
    assert torch.equal(unpack_bits(bits, (count,)), mask)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["magnitude", "random"])
def test_global_and_per_tensor_counts(family: str, kind: str) -> None:
    """exact_sparsity: over all matrices together with `global`, of each alone without."""
    counts = {}
    for flag in ("", "global"):
        model = zoo.tiny(family)
        plan = surgery.plan(surgery.parse(f"prune {kind} 30% {flag} on ffn"), model)
        surgery.apply(plan, model)
        weights = [model.get_submodule(part.path).get_parameter("weight") for part in plan.steps[0].parts]
        counts[flag] = [int((weight == 0).sum()) for weight in weights]
        sizes = [weight.numel() for weight in weights]
        if flag:
            assert sum(counts[flag]) == round(0.3 * sum(sizes))
        else:
            assert counts[flag] == [round(0.3 * size) for size in sizes]
    assert counts[""] != counts["global"], "ranking all together must move some of the cut from one matrix to another"


def test_only_the_rows_of_a_role_are_pruned_in_a_fused_projection() -> None:
    """frame: rows of k keep their bits when q and v are pruned."""
    model = zoo.tiny("gpt2")
    plan = surgery.plan(surgery.parse("prune magnitude 50% on attn.q,v"), model)
    path = plan.steps[0].parts[0].path
    before = model.get_submodule(path).weight.detach().clone()
    surgery.apply(plan, model)
    after = model.get_submodule(path).get_parameter("weight").detach()
    width = after.shape[0]
    assert torch.equal(after[:, width : 2 * width], before[:, width : 2 * width])
    assert int((after == 0).sum()) == round(0.5 * 2 * width * width)


def test_pruning_is_idempotent_and_masks_gradients() -> None:
    """exact_sparsity: pruning again to the same share changes nothing; a pruned weight that is trained stays zero."""
    model = surgery.apply(surgery.parse("prune magnitude 50% on ffn"), zoo.tiny("llama"))
    first = {name: tensor.clone() for name, tensor in surgery.merge(model).state_dict().items()}
    again = surgery.apply(surgery.parse("prune magnitude 50% on ffn"), model)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in first.items())
    for parameter in again.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    again(**zoo.inputs(again)).logits.square().sum().backward()
    weight = again.model.layers[0].mlp.down_proj.get_parameter("weight")
    assert weight.grad is not None
    assert bool((weight.grad[weight == 0] == 0).all())
    assert weight.grad.abs().max() > 0
