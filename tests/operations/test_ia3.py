"""IA3: what is scaled, where it starts, what a merge makes of it, over masks and four bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import surgery
from surgery.errors import PlanError
from surgery.graph.module import rewritten
from tests import studied, zoo

FAMILIES = ("llama", "gpt2", "phi3", "gpt_neox", "bert", "t5", "opt", "nano", "byhand")


@torch.no_grad()
def drawn(model: Any, seed: int = 0) -> dict[str, Tensor]:
    """Every vector at random around one."""
    tensors = surgery.parameters(model)
    for name, vector in tensors.items():
        draw = torch.randn(vector.shape, generator=zoo.seeded(seed, name), dtype=torch.float64)
        vector.copy_(1 + 0.4 * draw)
    return tensors


def distance(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize(
    "base", ["", "quantize base nf4 double\n", "quantize base int8\n", "prune magnitude 50% on attn + ffn\n"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_ones_change_no_bit_in_either_mode(family: str, base: str) -> None:
    """identity_at_init, off_means_off: over the plain, the 4-bit, the 8-bit and the pruned base."""
    one = zoo.specimen(family)
    wanted = zoo.specimen(family)
    if base:
        studied.apply(base, family, wanted.model)
    studied.apply(base + "ia3", family, one.model)
    for mode in (True, False):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            expected = zoo.logits(wanted.model.train(mode), one.inputs)
            torch.manual_seed(0)
            assert torch.equal(zoo.logits(one.model.train(mode), one.inputs), expected)
    drawn(one.model)
    assert distance(one.logits(), wanted.logits()) > 0.01, "the vectors have no effect"
    with surgery.disabled(one.model):
        assert torch.equal(one.logits(), wanted.logits())


@pytest.mark.parametrize("family", FAMILIES)
def test_unsaid_it_acts_on_keys_values_and_the_way_down(family: str) -> None:
    one = zoo.specimen(family)
    plan = surgery.plan(surgery.parse("ia3"), one.model, anatomy=studied.anatomy(family))
    assert {part.role for part in plan.steps[0].parts} == {"attn.k", "attn.v", "ffn.down"}
    surgery.apply(plan, one.model)
    sizes = [vector.numel() for vector in surgery.parameters(one.model).values()]
    wanted = [p.shape[1] if p.role == "ffn.down" else p.width for p in plan.steps[0].parts]
    assert sorted(sizes) == sorted(wanted)
    assert sum(sizes) == plan.cost.trainable


def test_formula_on_a_fused_projection_with_grouped_query_heads() -> None:
    """Only the rows of k and v are scaled, bias included; of the way down the input."""
    one = zoo.specimen("phi3", dtype=torch.float64)
    plain = copy.deepcopy(one.model)
    studied.apply("ia3", "phi3", one.model)
    tensors = drawn(one.model)
    layer: Any
    with torch.no_grad():
        for index, layer in enumerate(plain.model.layers):
            before = f"model.layers.{index}"
            width = 30  # queries
            fused = layer.self_attn.qkv_proj.weight
            fused[width : width + 6] *= tensors[f"{before}.self_attn.qkv_proj.ia3_output_k"][:, None]
            fused[width + 6 :] *= tensors[f"{before}.self_attn.qkv_proj.ia3_output_v"][:, None]
            layer.mlp.down_proj.weight *= tensors[f"{before}.mlp.down_proj.ia3_input"]
    assert distance(one.logits(), zoo.logits(plain, one.inputs)) < 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "bert"])
def test_a_merge_folds_rows_columns_and_biases(family: str, dtype: torch.dtype) -> None:
    """merges: into the names and shapes of the base, zeros staying zeros."""
    one = zoo.specimen(family, dtype=dtype)
    names = one.model.state_dict().keys()
    studied.apply("ia3\nprune magnitude 40% on ffn", family, one.model)
    drawn(one.model)
    zeros = {name: tensor == 0 for name, tensor in one.model.state_dict().items() if tensor.dim() == 2}
    wanted = one.logits()
    surgery.merge(one.model)
    assert not list(rewritten(one.model))
    assert one.model.state_dict().keys() == names
    assert distance(one.logits(), wanted) < 300 * torch.finfo(dtype).eps
    merged = one.model.state_dict()
    assert all((merged[name][zero] == 0).all() for name, zero in zeros.items())


def test_plan_does_not_warn_of_zeros_that_stay() -> None:
    model = zoo.tiny("llama")
    text = "prune magnitude 50% on ffn\nia3\nlora rank 2 on ffn.down"
    plan = surgery.plan(surgery.parse(text), model, anatomy=studied.anatomy("llama"))
    dense = [warning for warning in plan.warnings if "dense" in warning]
    assert len(dense) == 1
    assert "lora" in dense[0]


def test_vectors_of_16_bit_models_are_trained_in_32() -> None:
    one = zoo.specimen("llama", dtype=torch.bfloat16)
    studied.apply("ia3", "llama", one.model)
    assert {vector.dtype for vector in surgery.parameters(one.model).values()} == {torch.float32}
    assert one.logits().dtype == torch.bfloat16
    one.model.train()(**one.inputs).logits.float().square().mean().backward()
    assert all(vector.grad is not None and vector.grad.any() for vector in surgery.parameters(one.model).values())


def test_beside_lora_both_are_trained_and_merged() -> None:
    """The adapter of the way down reads the scaled activation, whatever the order of the statements."""
    results = []
    for text in ("ia3\nlora rank 2 on ffn.down + attn.v", "lora rank 2 on ffn.down + attn.v\nia3"):
        one = zoo.specimen("llama", dtype=torch.float64)
        studied.apply(text, "llama", one.model)
        drawn(one.model)
        results.append(one.logits())
    assert torch.equal(*results)
    layer: Any = one.model.model.layers[0].mlp.down_proj
    x = torch.randn(3, layer.in_features, dtype=torch.float64, generator=zoo.seeded(0, "x"))
    scaled = x * layer.ia3_input
    expected = scaled @ layer.weight.t() + scaled @ layer.lora_A.t() @ layer.lora_B.t()
    assert torch.allclose(layer(x), expected, atol=1e-12)
    surgery.merge(one.model)
    assert distance(one.logits(), results[0]) < 1e-9


def test_a_place_without_a_role_is_refused() -> None:
    """Error S101: of a path alone nobody knows which side to scale; in parentheses the role is kept."""
    model = zoo.tiny("llama")
    with pytest.raises(PlanError, match="depends on its role"):
        surgery.plan(surgery.parse('ia3 on "**.down_proj"'), model, anatomy=studied.anatomy("llama"))
    surgery.plan(surgery.parse('ia3 on ffn.down in "**.down_proj"'), model, anatomy=studied.anatomy("llama"))


def test_two_without_names_on_one_place_conflict_and_with_names_stack() -> None:
    model = zoo.tiny("llama")
    with pytest.raises(PlanError) as refused:
        surgery.plan(surgery.parse("ia3\nia3 on attn.k"), model, anatomy=studied.anatomy("llama"))
    assert refused.value.diagnostics[0].code == "S103"
    one = zoo.specimen("llama", dtype=torch.float64)
    studied.apply("ia3 as one\nia3 on attn.k as two", "llama", one.model)
    drawn(one.model)
    both = one.logits()
    surgery.activate(one.model, "one")
    assert not torch.equal(one.logits(), both)
    surgery.activate(one.model)
    assert torch.equal(one.logits(), both)


def test_saved_is_loaded(tmp_path: Any) -> None:
    one = zoo.specimen("gpt2")
    studied.apply("ia3\nquantize base nf4", "gpt2", one.model)
    drawn(one.model)
    surgery.save(one.model, tmp_path / "out")
    loaded = surgery.load(tmp_path / "out")
    assert torch.equal(zoo.logits(loaded, one.inputs), one.logits())
    assert surgery.parameters(loaded).keys() == surgery.parameters(one.model).keys()


def test_compiles_without_a_break() -> None:
    one = zoo.specimen("llama")
    studied.apply("ia3", "llama", one.model)
    drawn(one.model)
    wanted = one.logits()
    torch._dynamo.reset()
    compiled = torch.compile(one.model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.allclose(compiled(**one.inputs, use_cache=False).logits, wanted, atol=1e-5)
