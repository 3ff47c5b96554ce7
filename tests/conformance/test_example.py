"""The example program, verbatim, on the two real models: applied, verified, saved, loaded to the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from tests import zoo

PROGRAM = """\
quantize base nf4 double
lora rank 8 on attn.q,v
prefix 20 on all layers
prune magnitude 50% on ffn
"""
FFN = {"minilm": ("intermediate.dense", ".output.dense"), "smollm2": ("gate_proj", "up_proj", "down_proj")}
QV = {"minilm": ("self.query", "self.value"), "smollm2": ("q_proj", "v_proj")}


def is_ffn(name: str, path: str) -> bool:
    return path.endswith(FFN[name]) and "attention" not in path


def run(model: Any, rows: int = 2) -> Tensor:
    """Logits or hidden states of random tokens."""
    ids = zoo.tokens(1000, rows, 9)
    with torch.no_grad():
        result = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


def half_pruned(weight: Tensor) -> Tensor:
    """What magnitude pruning to 50% leaves, by sorting: the round(n / 2) smallest go, first ones on ties."""
    flat = weight.detach().float().abs().flatten()
    gone = torch.sort(flat, stable=True).indices[: round(0.5 * flat.numel())]
    mask = torch.ones_like(flat)
    mask[gone] = 0
    return weight.detach() * mask.view_as(weight).to(weight.dtype)


def encoded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """bitsandbytes' own packed bytes and (double-quantized) absmax."""
    import bitsandbytes.functional as bnb

    codes, state = bnb.quantize_4bit(weight.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4")
    return codes, state.absmax


@pytest.fixture(params=["minilm", pytest.param("smollm2", marks=pytest.mark.slow)])
def named(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, request.getfixturevalue(request.param)


def test_the_example_program_on_a_real_model(named: tuple[str, Any], tmp_path: Path) -> None:
    name, model = named
    base = run(model)
    ffn = {p: half_pruned(m.weight) for p, m in model.named_modules() if isinstance(m, nn.Linear) and is_ffn(name, p)}
    others = {
        p: m.weight.detach().clone()
        for p, m in model.named_modules()
        if isinstance(m, nn.Linear) and p not in ffn and m is not model.get_output_embeddings()
    }
    keys, kind = set(model.state_dict()), type(model)
    layers = model.config.num_hidden_layers

    surgery.apply(surgery.parse(PROGRAM), model)

    assert type(model) is kind
    assert keys <= set(model.state_dict())
    assert not torch.allclose(run(model), base, atol=1e-2), "the program has no effect"
    for path, weight in (ffn | others).items():
        codes, absmax = encoded(weight)
        module = model.get_submodule(path)
        assert torch.equal(getattr(module, "weight_codes", module._parameters.get("weight")), codes), path
        assert torch.equal(module.weight_absmax, absmax), path
        if path in ffn:
            wide = dequantized(module)
            assert int((weight == 0).sum()) == weight.numel() // 2
            assert (wide[weight == 0] == 0).all(), "a pruned weight is not zero after NF4"
            # NF4 rounds small weights to its zero as well: half is what pruning alone accounts for.
            assert int((wide == 0).sum()) >= weight.numel() // 2
    added = surgery.parameters(model)
    prefixes = [tensor for tensor_name, tensor in added.items() if "prefix" in tensor_name]
    assert len(prefixes) == 2 * layers
    assert all(tensor.shape[1] == 20 for tensor in prefixes)
    assert len(added) == 2 * layers + 2 * 2 * layers
    assert sum(path.endswith(QV[name]) for path, _ in model.named_modules()) == 2 * layers

    wanted = run(model)
    report = surgery.verify(model)
    assert report, str(report)
    assert {"identity_at_init", "merges", "exact_sparsity", "frame", "round_trip"} <= set(report.promises())
    assert torch.equal(run(model), wanted)

    surgery.save(model, tmp_path / "out")
    loaded = surgery.load(tmp_path / "out")
    assert type(loaded) is kind
    assert torch.equal(run(loaded), wanted)
    assert surgery.parameters(loaded).keys() == added.keys()
    with surgery.disabled(model), surgery.disabled(loaded):
        assert torch.equal(run(model), run(loaded))
        assert not torch.equal(run(model), wanted)


def dequantized(module: Any) -> Tensor:
    """The (out, in) weight that a rewritten place computes with."""
    from surgery.graph.draft import Draft

    draft = Draft(module, "", "weight")
    return draft.evaluate(draft.captured.weight).detach()


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


def test_no_grad_forwards_do_not_repack_the_codes(minilm: Any, tmp_path: Path) -> None:
    """On a processor with AVX512-BF16 bitsandbytes repacks its own layers' codes in place at such a forward."""
    model = surgery.apply(surgery.parse("quantize base nf4 double; lora rank 4 on attn.q,v"), minilm.bfloat16())
    with torch.no_grad():
        for name, parameter in surgery.parameters(model).items():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=zoo.seeded(0, name)))
    surgery.save(model, tmp_path / "before")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run(model.eval())
    run(model.eval())
    surgery.save(model, tmp_path / "after")
    assert bytes_of(tmp_path / "before") == bytes_of(tmp_path / "after")
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert surgery.verify(model)
    merged_after = surgery.merge(model).state_dict()
    merged_before = surgery.merge(surgery.load(tmp_path / "before")).state_dict()
    assert all(torch.equal(tensor, merged_before[name]) for name, tensor in merged_after.items())
