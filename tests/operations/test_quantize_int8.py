"""8-bit weights: bitsandbytes' bytes, loaded by transformers and by us, and composed with everything 4 bits are."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import surgery
from surgery.checkpoint.merging import merged_shapes, stream_merge
from surgery.checkpoint.save import save_merged
from surgery.errors import SurgeryError
from surgery.graph.codes import dequantize_8bit, encode_8bit
from surgery.verify.bounds import relative_error
from tests import zoo
from tests.checkpoint.test_save_load import bits, randomised, same_bits
from tests.checkpoint.test_streaming import both_ways, files

FAMILIES = ("llama", "gpt2", "phi3", "opt", "bert", "t5", "gpt_neox", "qwen2")
QUICK = ("llama", "gpt2", "opt", "t5")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_codes_are_those_of_bitsandbytes(dtype: torch.dtype) -> None:
    """Odd sizes, a row of zeros, a row with one number; what they stand for is within half a step of each row."""
    import bitsandbytes.functional as bnb

    weight = torch.randn(37, 51, generator=zoo.seeded(1, "weight"), dtype=torch.float64).to(dtype)
    weight[3], weight[5] = 0, 0
    weight[5, 7] = -2
    codes, absmax = encode_8bit(weight)
    theirs, rows, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16))
    filled = rows > 0
    assert torch.equal(codes[filled], theirs[filled])
    assert torch.equal(absmax, rows)
    assert not codes[3].any()
    wide = dequantize_8bit(codes, absmax, torch.float64)
    step = absmax.double().unsqueeze(1) / 127
    assert ((wide - weight.to(torch.float16).double()).abs() <= step * 0.5001).all()
    assert (wide != weight).float().mean() > 0.9
    assert torch.equal(wide == 0, wide.float() == 0)
    huge = weight.to(torch.float64) * 1e5
    wide = dequantize_8bit(*encode_8bit(huge), torch.float64)
    assert relative_error(wide, huge) < 0.01


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=() if family in QUICK else pytest.mark.slow) for family in FAMILIES]
)
def test_runs_merges_and_is_verified(family: str) -> None:
    """The forward is that of the widened weights; adapters train on top; every promise holds."""
    model = zoo.tiny(family)
    fed = zoo.inputs(model)
    before = zoo.logits(model, fed)
    surgery.apply(surgery.parse("quantize base int8; lora rank 2 on all linear"), model)
    plain = zoo.logits(model, fed)
    assert 1e-4 < relative_error(plain, before) < 0.1
    held = {name: tensor for name, tensor in model.named_parameters() if name.endswith("weight_codes")}
    assert len(held) > 5
    for name, codes in held.items():
        site = model.get_submodule(name.rpartition(".")[0])
        assert codes.dtype == torch.int8
        assert codes.shape == site.facts.shape
        assert site.get_buffer("weight_absmax").shape == codes.shape[:1]
    assert surgery.verify(model)
    model.train()
    first = zoo.logits(randomised(model).eval(), fed)
    loss = model(**fed)[0].float().square().mean()
    loss.backward()
    gradients = [parameter.grad for parameter in surgery.parameters(model).values()]
    assert all(gradient is not None and bool(gradient.abs().sum() > 0) for gradient in gradients[:2])
    surgery.merge(model)
    assert relative_error(zoo.logits(model, fed), first) < 1e-5
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


PAIRS = (
    "lora rank 2 dora on attn", "lora rank 2 init pissa on attn.q", "lora rank 2 init loftq 2 on attn.o", "ia3",
    "prune magnitude 50% on ffn", "prune neurons 25% by magnitude on ffn", "adapter bottleneck 3 after ffn",
    "prefix 2 gated on all layers", "quantize ffn nf4", "train norm", "drop layers 0",
)  # fmt: skip


@pytest.mark.parametrize(
    "other",
    [pytest.param(other, marks=() if index % 3 == 0 else pytest.mark.slow) for index, other in enumerate(PAIRS)],
)
def test_with_another_statement(other: str, tmp_path: Path) -> None:
    """In either order, saved, loaded and merged."""
    texts = (f"quantize attn int8\n{other}", f"{other}\nquantize attn int8")
    one, two = (surgery.apply(surgery.parse(text), zoo.tiny("llama")) for text in texts)
    same_bits(bits(one), bits(two))
    fed = zoo.inputs(one)
    randomised(one)
    before = zoo.logits(one, fed)
    surgery.save(one, tmp_path / "out")
    loaded = surgery.load(tmp_path / "out")
    same_bits(bits(loaded), bits(one))
    assert torch.equal(zoo.logits(loaded, fed), before)
    assert any(tensor.dtype == torch.int8 for tensor in loaded.parameters())
    assert relative_error(zoo.logits(surgery.merge(loaded), fed), before) < 1e-5
    assert not any(tensor.dtype == torch.int8 for tensor in loaded.parameters())


def test_pruned_weights_stay_zero() -> None:
    model = surgery.apply(surgery.parse("prune magnitude 50% on ffn; quantize base int8"), zoo.tiny("llama"))
    surgery.merge(model)
    shares = [float((layer.mlp.up_proj.weight == 0).float().mean()) for layer in model.model.layers]
    assert min(shares) >= 0.5


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_reads_and_computes_the_same(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Tensor for tensor what transformers writes itself; equal logits where its own product widens the weights, and
    near ones in evaluation, where LLM.int8 rounds what comes in as well."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    zoo.tiny(family, dtype=dtype).save_pretrained(tmp_path / "base")
    kept = BitsAndBytesConfig(load_in_8bit=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=kept, device_map="cpu")
    theirs.save_pretrained(tmp_path / "theirs")
    live, streamed, why = both_ways(surgery.parse("quantize base int8"), tmp_path / "base", tmp_path)
    assert why is None
    assert live == streamed
    ours, wanted = (
        load_file(tmp_path / "live" / "model.safetensors"),
        load_file(tmp_path / "theirs" / "model.safetensors"),
    )
    assert ours.keys() == wanted.keys()
    assert sum(name.endswith("SCB") for name in ours) > 10
    same_bits(ours, wanted)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "live", local_files_only=True)
    mine = surgery.load(tmp_path / "live")
    fed = zoo.inputs(mine)
    logits = zoo.logits(mine, fed)
    assert relative_error(zoo.logits(loaded.train(), fed), logits) < 1e-6
    assert 0 < relative_error(zoo.logits(loaded.eval(), fed), logits) < 0.1
    assert "load_in_8bit" in json.loads((tmp_path / "live" / "config.json").read_text())["quantization_config"]


def test_requantized_and_streamed(tmp_path: Path) -> None:
    model = surgery.apply(surgery.parse("quantize base int8; lora rank 2 on attn.q,v"), zoo.tiny("gpt2"))
    surgery.save(randomised(model), tmp_path / "out")
    wide = zoo.logits(surgery.merge(copy.deepcopy(model)), zoo.inputs(model))
    for requantize in (False, True):
        shapes = merged_shapes(tmp_path / "out", requantize)
        assert shapes is not None
        stream_merge(tmp_path / "out", shapes, tmp_path / f"stream {requantize}", force=False)
        merged = surgery.merge(surgery.load(tmp_path / "out"), requantize=requantize)
        save_merged(merged, tmp_path / f"live {requantize}", source=tmp_path / "out")
        assert files(tmp_path / f"live {requantize}") == files(tmp_path / f"stream {requantize}")
        error = relative_error(zoo.logits(merged, zoo.inputs(model)), wide)
        assert (0 < error < 0.1) if requantize else error < 1e-6


def test_cast_moved_and_not_trained() -> None:
    """Codes and scales survive a cast of the model, and what they become follows it."""
    model = surgery.apply(surgery.parse("quantize base int8"), zoo.tiny("llama"))
    before = {name: tensor.clone() for name, tensor in model.named_buffers() if name.endswith("absmax")}
    fed, wanted = zoo.inputs(model), zoo.logits(model, zoo.inputs(model))
    model.to(torch.bfloat16)
    assert {name: tensor.dtype for name, tensor in model.named_buffers() if name in before} == dict.fromkeys(
        before, torch.float32
    )
    found = zoo.logits(model, fed)
    assert found.dtype == torch.bfloat16
    assert relative_error(found, wanted) < 0.05
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("text", "word"),
    [("quantize ffn int8 double", "double"), ("quantize ffn int8 block 128", "block"), ("quantize ffn int4", "int4")],
)
def test_options_that_mean_nothing(text: str, word: str) -> None:
    with pytest.raises(SurgeryError) as caught:
        surgery.parse(text)
    assert word in str(caught.value)


def test_a_plain_module_and_its_place(tmp_path: Path) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(13, 29), nn.Linear(29, 7, bias=False)

        def forward(self, x: torch.Tensor) -> Any:
            return self.two(torch.relu(self.one(x)))

    x = torch.randn(3, 13, generator=zoo.seeded(2, "x"))
    model = Plain().requires_grad_(False)
    before = model(x)
    surgery.apply(surgery.parse('quantize "*" int8'), model, example_inputs=(x,))
    after = model(x)
    assert 0 < relative_error(after, before) < 0.1
    surgery.save(model, tmp_path / "out")
    assert torch.equal(surgery.load(tmp_path / "out", Plain())(x), after)
