"""Adapters that start from a weight that becomes codes: what they win back of what the codes lose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.graph.codes import register
from surgery.graph.module import rewritten
from surgery.operations.base import Variant
from surgery.operations.lora import Lora
from tests import zoo
from tests.operations.test_lora import refused

SHAPES = ["llama", "gpt2", "phi3"]  # apart, stored (in, out) and fused, fused
CODES = ["nf4", "fp4 double block 32", "int8"]


def matrices(model: nn.Module, role: str) -> dict[str, Tensor]:
    """(out, in) weights of a role, its own rows only, by path."""
    found = {}
    for part in surgery.study(model).parts:
        if part.role == role:
            weight = model.get_submodule(part.path).weight.detach()
            weight = (weight.t() if part.transposed else weight).clone()
            runs = part.channels or ((0, part.shape[0]),)
            found[part.path] = torch.cat([weight[start:stop] for start, stop in runs])
    return found


def lost(program: str, role: str, **model: Any) -> dict[str, float]:
    """||W - W'|| at the start, W' being what the whole place computes, as a merge has it."""
    base = matrices(zoo.tiny(**model), role)
    merged = surgery.merge(surgery.apply(surgery.parse(program), zoo.tiny(**model)))
    return {path: (weight - base[path]).norm().item() for path, weight in matrices(merged, role).items()}


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("family", SHAPES)
def test_what_codes_lose_is_less_with_an_adapter_that_starts_from_the_weight(family: str, codes: str) -> None:
    """init: ||W - (Q + s B A)|| is smaller with one turn than for codes alone, and smaller still with five."""
    tail = "alpha 7 {} on attn.q,v"
    plain = lost(f"quantize base {codes}; lora rank 3 {tail.format('')}", "attn.q", family=family)
    for init in ("init pissa", "init loftq 1"):
        found = lost(f"quantize base {codes}; lora rank 3 {tail.format(init)}", "attn.q", family=family)
        assert found.keys() == plain.keys()
        assert all(found[path] < 0.95 * plain[path] for path in plain), init
        if init == "init loftq 1":
            more = lost(f"quantize base {codes}; lora rank 3 {tail.format('init loftq')}", "attn.q", family=family)
            assert all(more[path] < found[path] for path in plain)


def reference_loftq(weight: Tensor, rank: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Codes' values and B A, as PEFT's `loftq_init` computes them with 4 bits (which it does on CUDA alone)."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    register()
    residual = weight
    for _ in range(iterations):
        codes, state = quantize_4bit(residual.contiguous(), quant_type="nf4", blocksize=64)
        quantized = dequantize_4bit(codes, state)
        u, sigma, v = torch.linalg.svd(weight - quantized, full_matrices=False)
        product = (u[:, :rank] * sigma[:rank]) @ v[:rank]
        residual = weight - product
    return quantized, product


@pytest.mark.parametrize("iterations", [1, 3])
def test_loftq_is_the_papers(iterations: int) -> None:
    """Conformance: the same codes to the bit, and the same product, after the same number of turns."""
    shape = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    base = matrices(zoo.tiny("llama", **shape), "attn.q")
    program = f"quantize base nf4; lora rank 4 alpha 6 init loftq {iterations} on attn.q"
    model = surgery.apply(surgery.parse(program), zoo.tiny("llama", **shape))
    assert len(base) == 3
    for path, weight in base.items():
        quantized, product = reference_loftq(weight, 4, iterations)
        site: Any = model.get_submodule(path)
        a, b = site.lora_A.detach(), site.lora_B.detach()
        eye = torch.eye(weight.shape[1])
        with surgery.disabled(model), torch.no_grad():
            assert torch.equal(site(eye).t(), quantized)
        assert (6 / 4 * b @ a - product).abs().max() <= 1e-5 * product.abs().max()
        assert torch.allclose(a.norm(dim=1), b.norm(dim=0)), "both factors get half of each singular value"


def test_the_residual_of_pissa_is_what_becomes_codes() -> None:
    """QPiSSA: the codes are bitsandbytes' own of W less its largest singular triplets."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    shape = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    base = matrices(zoo.tiny("llama", **shape), "attn.v")
    model = surgery.apply(
        surgery.parse("quantize base nf4; lora rank 4 init pissa on attn.v"), zoo.tiny("llama", **shape)
    )
    for path, weight in base.items():
        u, sigma, v = torch.linalg.svd(weight, full_matrices=False)
        codes, state = quantize_4bit((weight - (u[:, :4] * sigma[:4]) @ v[:4]).contiguous(), quant_type="nf4")
        site: Any = model.get_submodule(path)
        with surgery.disabled(model), torch.no_grad():
            found = site(torch.eye(weight.shape[1])).t()
        assert (found - dequantize_4bit(codes, state)).abs().max() <= 1e-5 * found.abs().max()
        assert (found - weight).norm() > 0.3 * weight.norm()


@pytest.mark.parametrize("init", ["pissa", "loftq 2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_it_verifies_saves_and_loads(init: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """merges, exact_codes, frame, round_trip: of fused and plain projections, on every dtype."""
    for family in ("phi3", "qwen2"):
        model = zoo.tiny(family, dtype=dtype)
        fed = zoo.inputs(model)
        program = f"quantize base nf4 double; lora rank 2 init {init} on attn.q,v + ffn.down; lora rank 1 on attn.o"
        surgery.apply(surgery.parse(program), model)
        report = surgery.verify(model)
        assert report, str(report)
        surgery.save(model, tmp_path / f"{family}")
        loaded = surgery.load(tmp_path / f"{family}")
        assert torch.equal(zoo.logits(loaded, fed), zoo.logits(model, fed))
        for path, module in rewritten(model):
            assert all(torch.isfinite(each).all() for each in module.parameters() if each.is_floating_point()), path


def test_statements_on_rows_of_one_matrix_share_its_codes() -> None:
    """order: two statements on q and on v of a fused weight, whose blocks of codes run across the border."""
    texts = ["quantize base nf4", "lora rank 2 init loftq on attn.q", "lora rank 3 init pissa on attn.v as second"]
    one, other = (
        surgery.apply(surgery.parse("\n".join(order)), zoo.tiny("phi3")).state_dict() for order in (texts, texts[::-1])
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    program = "\n".join(texts)
    plain = program.replace("init loftq ", "").replace("init pissa ", "")
    for role in ("attn.q", "attn.v"):
        found, before = lost(program, role, family="phi3"), lost(plain, role, family="phi3")
        assert all(found[path] < 0.95 * before[path] for path in before)


def test_a_start_that_cannot_be_is_refused() -> None:
    """Error: loftq without codes, masks that a residual would fill, norms of DoRA, lookups, codes made earlier."""
    wrong = {
        "lora rank 2 init loftq on attn.q": "S380",
        "quantize ffn nf4; lora rank 2 init loftq on attn.q": "S380",
        "quantize base nf4; prune magnitude 50% on attn; lora rank 2 init pissa on attn.q": "S103",
        "quantize base nf4; prune magnitude 50% on attn; lora rank 2 init loftq on attn.q": "S103",
        "quantize base nf4; lora rank 2 dora on attn.q as a; lora rank 2 init loftq on attn.q as b": "S103",
        "lora rank 2 init loftq on embed": "S101",
    }
    for program, code in wrong.items():
        assert {each.code for each in refused(program, zoo.tiny("llama")).diagnostics} == {code}, program
    for program in ("lora rank 2 dora init loftq on attn.q", "lora rank 2 init loftq 0 on attn.q"):
        with pytest.raises(surgery.SurgeryError):
            surgery.parse(program)


def test_the_number_of_turns_is_written_and_read() -> None:
    said = surgery.parse("lora rank 2 init loftq on attn.q").statements[0]
    assert said.operation == Lora(rank=2, init=Variant("loftq", 5))
    assert surgery.parse(str(said)).statements[0] == said
    assert str(surgery.parse("lora rank 2 init kaiming on attn.q").statements[0]) == "lora rank 2 on attn.q"
