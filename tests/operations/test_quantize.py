"""4-bit weights: the forward is that of the codes, and codes and scales survive casts and merges."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery
from surgery.graph.module import Rewritten
from tests import zoo

FED = (zoo.tokens(51),)
CASES = [*((family, {}) for family in zoo.FAMILIES), ("t5", {"feed_forward_proj": "gated-gelu"})]
CASTS = (torch.bfloat16, torch.float16, torch.float64)


def gap(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, as a share of the largest entry."""
    return float((found.double() - wanted.double()).abs().max() / wanted.abs().max())


def quantized(family: str, program: str = "quantize base nf4", **changes: Any) -> Any:
    return surgery.apply(surgery.parse(program), zoo.tiny(family, **changes))


def sites(model: nn.Module) -> dict[str, Rewritten]:
    return {path: each for path, each in model.named_modules() if isinstance(each, Rewritten)}


def stored(model: nn.Module) -> dict[str, Tensor]:
    """Everything that quantization put into the model: codes and scales."""
    return {
        name: tensor.detach().clone()
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if name.rpartition(".")[2].startswith("weight_")
    }


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    """Names, dtypes and bits agree."""
    return found.keys() == wanted.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in wanted.items()
    )


@pytest.mark.parametrize(("family", "changes"), CASES)
@pytest.mark.parametrize("program", ["quantize base nf4", "quantize base fp4 double"])
def test_the_forward_is_that_of_the_widened_weights(family: str, changes: dict[str, Any], program: str) -> None:
    """merges: quantized and merged models agree, whatever the model asks about the dtype of its weights."""
    model = quantized(family, program, **changes)
    base = zoo.tiny(family, **changes)
    fed = zoo.inputs(model)
    found = zoo.logits(model, fed)
    assert gap(found, zoo.logits(base, fed)) > 1e-3
    for path, site in sites(model).items():
        assert site.weight.dtype == base.get_submodule(path).weight.dtype, "models ask for it and cast by it"
        assert site.get_parameter("weight_codes").dtype == torch.uint8
        assert not site.get_parameter("weight_codes").requires_grad
        assert "weight" not in dict(site.named_parameters(recurse=False))
    assert len(sites(model)) > 9
    surgery.merge(model)
    assert gap(zoo.logits(model, fed), found) <= 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_sixteen_bit_bases_read_as_such(family: str) -> None:
    """merges: the dtype that a quantized place shows is the base's, and the merged weight has it again."""
    model = quantized(family, dtype=torch.bfloat16)
    base = zoo.tiny(family, dtype=torch.bfloat16)
    fed = zoo.inputs(model)
    found = zoo.logits(model, fed)
    assert {site.weight.dtype for site in sites(model).values()} == {torch.bfloat16}
    assert found.dtype == torch.bfloat16
    assert {p.dtype for p in surgery.merge(model).parameters()} == {torch.bfloat16}
    assert gap(zoo.logits(model, fed), found) <= gap(zoo.logits(base.float(), fed), zoo.logits(base, fed)) + 0.02


@pytest.mark.parametrize("program", ["quantize base nf4 double", "quantize base nf4\nlora rank 2 on attn.q,v"])
@pytest.mark.parametrize("dtype", CASTS, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_cast_leaves_codes_and_scales_alone(family: str, dtype: torch.dtype, program: str) -> None:
    """exact_codes: `.to(dtype)` is for the rest of the model; the logits move no more than those of a plain model."""
    model = quantized(family, program)
    for name, parameter in surgery.parameters(model).items():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=zoo.seeded(5, name)))
    fed = zoo.inputs(model)
    wanted, before = zoo.logits(model, fed), stored(model)
    assert len(before) >= 2 * len(sites(model)) > 0
    plain = surgery.merge(copy.deepcopy(model))
    rounding = gap(zoo.logits(plain.to(dtype), fed), wanted)
    model.to(dtype)
    after = stored(model)
    assert same(after, before)
    found = zoo.logits(model, fed)
    assert found.dtype == dtype
    assert bool(torch.isfinite(found).all())
    assert gap(found, wanted) <= 3 * rounding + 1e-5
    assert gap(found, wanted) < 0.2 * gap(zoo.logits(zoo.tiny(family), fed), wanted)
    merged = zoo.logits(surgery.merge(model), fed)
    assert merged.dtype == dtype
    assert not sites(model)
    assert gap(merged, wanted) <= 3 * rounding + 1e-5


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
def test_casts_by_name_and_back(cast: str) -> None:
    """exact_codes: there and back again changes what a cast rounds, and no code or scale."""
    model = quantized("llama", "quantize base nf4 double")
    fed = zoo.inputs(model)
    wanted, before = zoo.logits(model, fed), stored(model)
    getattr(model, cast)().float()
    after = stored(model)
    assert same(after, before)
    # Norms and the embedding were rounded.
    assert gap(zoo.logits(model, fed), wanted) <= {"bfloat16": 0.05, "half": 0.01}.get(cast, 0)


def test_scales_are_narrow_whatever_the_default_dtype() -> None:
    """exact_codes: a program applied under another default dtype stores the same bits."""
    wanted = stored(quantized("llama", "quantize base nf4 double"))
    model = zoo.tiny("llama")
    fed = zoo.inputs(model)
    torch.set_default_dtype(torch.float64)
    try:
        surgery.apply(surgery.parse("quantize base nf4 double"), model)
        found = stored(model)
        logits = zoo.logits(model, fed)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {tensor.dtype for tensor in found.values()} == {torch.uint8, torch.float32}
    assert same(found, wanted)
    assert bool(torch.isfinite(logits).all())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("compute", ["", "compute bf16", "compute fp16"])
def test_a_merge_gives_the_weight_of_the_codes_and_leaves_the_bias(family: str, compute: str) -> None:
    """merges: the dtype of the product is no part of the weight: what bitsandbytes widens the codes to, bit for bit."""
    import bitsandbytes.functional as bnb

    base = zoo.tiny(family)
    model = quantized(family, f"quantize base nf4 {compute}")
    places = list(sites(model))
    assert len(places) >= 12
    surgery.merge(model)
    for path in places:
        before, after = base.get_submodule(path), model.get_submodule(path)
        turned = family == "gpt2"
        weight = before.weight.detach()
        weight = weight.t().contiguous() if turned else weight
        codes, scales = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        wide = bnb.dequantize_4bit(codes, scales)
        assert torch.equal(after.weight.t() if turned else after.weight, wide), path
        assert type(after) is type(before)
        if before.bias is not None:
            assert torch.equal(after.bias, before.bias), path


class Dropping(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(F.linear(x, self.weight, self.bias))


@pytest.mark.parametrize("program", ["quantize base nf4", "quantize base nf4 compute fp32\nlora rank 2 on ffn"])
def test_a_module_with_a_child_is_quantized(program: str) -> None:
    """merges: dropout inside a place stays a child that follows the mode, over codes as over a plain weight."""
    model = zoo.plain("byhand", dtype=torch.float32)
    for number, block in enumerate(model.blocks):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            block.lift = Dropping(block.lift.in_features, block.lift.out_features)
    model.eval()
    base = model(*FED).detach()
    surgery.apply(surgery.parse(program), model, example_inputs=FED)
    found = model(*FED).detach()
    assert 1e-3 < gap(found, base) < 1
    assert torch.equal(model(*FED), found)
    torch.manual_seed(0)
    dropped = model.train()(*FED).detach()
    assert not torch.equal(dropped, model(*FED)), "another draw each time in training"
    torch.manual_seed(0)
    assert torch.equal(dropped, model(*FED))
    surgery.merge(model.eval())
    assert gap(model(*FED).detach(), found) <= 1e-5


@pytest.mark.parametrize("width", [24, 48, 96, 64, 128])
def test_rows_that_are_no_whole_blocks(width: int) -> None:
    """Our weights are the codes' levels times the block's scale, whatever the width; the plan warns where bitsandbytes
    may read other ones from them."""
    import bitsandbytes.functional as bnb

    program = surgery.parse("quantize attn.q nf4")
    model = zoo.tiny("llama", hidden_size=width, num_attention_heads=4, head_dim=6)
    plan = surgery.plan(program, model)
    told = [each for each in plan.warnings if "whole blocks of 64" in each]
    assert len(told) == (1 if width % 64 else 0)
    assert not told or f"q_proj has {width}" in told[0]
    int8 = surgery.plan(surgery.parse("quantize attn.q int8"), model)
    assert not [each for each in int8.warnings if "blocks" in each]
    surgery.apply(plan, model)
    site = model.model.layers[0].self_attn.q_proj
    packed, absmax = site.weight_codes.reshape(-1), site.weight_absmax
    levels = bnb.get_4bit_type("nf4", device="cpu")[torch.stack([packed >> 4, packed & 15], 1).reshape(-1).long()]
    wanted = (levels * absmax.repeat_interleave(64)[: levels.numel()]).reshape(site.facts.shape)
    assert gap(site(torch.eye(width)).detach().t(), wanted) < 1e-6
