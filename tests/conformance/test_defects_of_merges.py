"""Defects that peers are known for: of merges and combinations, and of their tolerances (1 to 5, 14, 16)."""

from __future__ import annotations

import pytest
import torch

import surgery
from surgery.verify.bounds import merge_bound, relative_error
from tests import zoo
from tests.conformance.defects import trained, weights


def test_defect_01_a_small_adapter_survives_a_merge_into_a_4_bit_model() -> None:
    """Where codes are taken again, an adapter of a hundredth of its base is gone; a merge here gives full width."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    model = trained(zoo.tiny("llama"), "quantize base nf4; lora rank 2 on attn.q", size=0.08)
    fed = zoo.inputs(model)
    with surgery.disabled(model):
        base = zoo.logits(model, fed)
    adapted = zoo.logits(model, fed)
    with surgery.disabled(model):
        codes_alone = surgery.merge(trained(zoo.tiny("llama"), "quantize base nf4; lora rank 2 on attn.q", size=0.0))
    merged = surgery.merge(model)
    effect = (adapted - base).abs().max()
    assert (zoo.logits(merged, fed) - adapted).abs().max() < 1e-4 * effect
    for path, weight in weights(merged, "attn.q").items():
        quantized = codes_alone.get_submodule(path).weight
        delta = (weight - quantized).norm() / quantized.norm()
        assert 0 < delta <= 1e-2
        again, state = quantize_4bit(weight.detach(), quant_type="nf4", blocksize=64)
        kept = (dequantize_4bit(again, state) - quantized).norm() / (weight - quantized).norm()
        assert kept < 0.9 or kept > 1.1, "this adapter is large enough to survive, so the test shows nothing"


def test_defect_02_a_bfloat16_merge_adds_in_float32_and_rounds_once() -> None:
    base = weights(zoo.tiny("qwen2", dtype=torch.bfloat16), "ffn.up")
    model = trained(zoo.tiny("qwen2", dtype=torch.bfloat16), "lora rank 2 on ffn.up", size=0.1)
    added = surgery.parameters(model)
    deltas = {path: added[f"{path}.lora_B"].detach() @ added[f"{path}.lora_A"].detach() for path in base}
    merged = weights(surgery.merge(model), "ffn.up")
    twice = 0
    for path, delta in deltas.items():
        assert torch.equal(merged[path], (base[path].float() + delta).bfloat16())
        twice += int((merged[path] != base[path] + delta.bfloat16()).sum())
    assert twice > 0, "rounding twice would have given the same"


def test_defect_03_a_merge_after_a_forward_is_the_merge_before_it() -> None:
    """bitsandbytes repacks its codes in place at an eval forward on some processors; ours stay as they are."""
    program = "quantize base nf4 double; lora rank 3 on attn.q,v"
    models = [trained(zoo.tiny("llama", dtype=torch.bfloat16), program) for _ in range(2)]
    with torch.no_grad():
        for _ in range(2):
            models[0].eval()(**zoo.inputs(models[0]))
    one, other = (surgery.merge(model).state_dict() for model in models)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    base = zoo.tiny("llama", dtype=torch.bfloat16).state_dict()
    assert all(not torch.equal(one[name], base[name]) for name in one if name.endswith("q_proj.weight"))


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_defect_04_a_merge_into_a_tied_head_leaves_the_embedding_alone(family: str) -> None:
    model = trained(zoo.tiny(family), "lora rank 2 on head", size=1.0)
    embedding = model.get_input_embeddings().weight.detach().clone()
    fed = zoo.inputs(model)
    adapted = zoo.logits(model, fed)
    assert relative_error(adapted, zoo.logits(zoo.tiny(family), fed)) > 0.1
    merged = surgery.merge(model)
    assert torch.equal(merged.get_input_embeddings().weight, embedding)
    assert not torch.equal(merged.get_output_embeddings().weight, embedding)
    assert relative_error(zoo.logits(merged, fed), adapted) < merge_bound(torch.float32, 2, 1.0)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_defect_05_merging_some_adapters_leaves_the_others(family: str) -> None:
    """PEFT drops those that are not merged; here they stay, on or off as they were, and are merged later."""
    model = trained(zoo.tiny(family), "lora rank 2 on attn as one\nlora rank 2 on attn.q,v + ffn as two")
    fed = zoo.inputs(model)
    both = zoo.logits(model, fed)
    surgery.activate(model, "one")
    alone = zoo.logits(model, fed)
    surgery.activate(model)
    surgery.merge(model, only=["one"])
    assert surgery.active(model) == ("two",)
    assert (zoo.logits(model, fed) - both).abs().max() <= 1e-5 * both.abs().max()
    with surgery.disabled(model):
        assert (zoo.logits(model, fed) - alone).abs().max() <= 1e-5 * alone.abs().max()
    surgery.merge(model)
    assert (zoo.logits(model, fed) - both).abs().max() <= 1e-5 * both.abs().max()
    assert (both - alone).abs().max() > 1e-2 * both.abs().max()


def test_defect_14_a_combination_keeps_the_scale_of_each_adapter() -> None:
    """What is summed is s B A, with alpha/sqrt(r) as with alpha/r, and of any ranks."""
    program = "lora rank 4 alpha 6 scale rs on attn.q as one; lora rank 2 alpha 5 on attn.q as other"
    model = trained(zoo.tiny("llama"), program)
    added = {name: tensor.detach().clone() for name, tensor in surgery.parameters(model).items()}
    surgery.combine(model, {"one": 0.7, "other": -0.4}, name="both")
    surgery.activate(model, "both")
    base, merged = weights(zoo.tiny("llama"), "attn.q"), weights(surgery.merge(model, only=["both"]), "attn.q")
    for path, weight in base.items():
        one, other = (added[f"{path}.{n}_lora_B"] @ added[f"{path}.{n}_lora_A"] for n in ("one", "other"))
        wanted = 0.7 * 6 / 4**0.5 * one - 0.4 * 5 / 2 * other
        assert relative_error(merged[path] - weight, wanted) < 1e-5


def test_defect_14_a_merge_over_codes_scales_nothing_but_the_branch() -> None:
    """The bias of a quantized map keeps its bits, and the merged map is what was computed before."""
    model = trained(zoo.tiny("qwen2"), "quantize base nf4; lora rank 2 alpha 7 on attn.q,v", size=1.0)
    fed = zoo.inputs(model)
    biases = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.endswith("bias")}
    assert len(biases) == 9
    adapted = zoo.logits(model, fed)
    merged = surgery.merge(model)
    assert all(torch.equal(merged.state_dict()[name], tensor) for name, tensor in biases.items())
    assert relative_error(zoo.logits(merged, fed), adapted) < merge_bound(torch.float32, 6, 1.0)


def test_defect_16_errors_are_compared_with_the_effect() -> None:
    """A 4-bit merge that loses a tenth of the adapter passes `atol=1e-2, rtol=10`, and not the bound of `verify`."""
    model = trained(zoo.tiny("llama"), "quantize base nf4; lora rank 2 on attn.q,v", size=0.1)
    assert surgery.verify(model)
    fed = zoo.inputs(model)
    adapted = zoo.logits(model, fed)
    merged = surgery.merge(model)
    assert relative_error(zoo.logits(merged, fed), adapted) < merge_bound(torch.float32, 9, 1.0)
    with surgery.disabled(model), torch.no_grad():
        for path, weight in weights(merged, "attn.q").items():
            delta = (
                weight
                - weights(
                    surgery.merge(trained(zoo.tiny("llama"), "quantize base nf4; lora rank 2 on attn.q", size=0.0)),
                    "attn.q",
                )[path]
            )
            weight -= 0.1 * delta
    wrong = zoo.logits(merged, fed)
    torch.testing.assert_close(wrong, adapted, atol=1e-2, rtol=10)
    assert relative_error(wrong, adapted) > merge_bound(torch.float32, 9, 1.0)
