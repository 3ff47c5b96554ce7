"""Verification sees what is broken, on the model as it is now; what it cannot check it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import SqueezeBertConfig, SqueezeBertForMaskedLM

import surgery
from tests import zoo
from tests.reference_decoder import Shape, reference_decoder

PROGRAM = "lora rank 2 on attn.q,v; prune magnitude 50% on ffn; quantize attn nf4 double; prefix 3 on all layers"


def transformed(program: str = PROGRAM) -> Any:
    return surgery.apply(surgery.parse(program), zoo.tiny("llama"))


def test_a_green_report_covers_every_promise() -> None:
    report = surgery.verify(transformed())
    assert report, str(report)
    always = {"complete", "frame", "round_trip"}
    assert always | {"identity_at_init", "merges", "exact_sparsity", "exact_codes"} <= set(report.promises())
    assert not report.warnings, str(report)
    assert all(finding.status == "holds" for finding in report.findings)


@torch.no_grad()
def revive_a_weight(model: Any) -> None:
    weight = model.model.layers[1].mlp.up_proj.weight
    weight[tuple((weight == 0).nonzero()[0])] = 0.5


@torch.no_grad()
def write_to_a_norm(model: Any) -> None:
    model.model.norm.weight[3] += 1e-3


def train_the_base(model: Any) -> None:
    model.lm_head.weight.requires_grad_(True)


def codes_of(layer: Any) -> torch.Tensor:
    held = (*layer.self_attn.q_proj.parameters(), *layer.self_attn.q_proj.buffers())
    (codes,) = (tensor for tensor in held if tensor.dtype == torch.uint8 and tensor.dim() == 2)
    return codes


def repack_codes(model: Any) -> None:
    """What bitsandbytes' own layer does to its codes at a no-grad forward on some processors, or nearly."""
    codes = codes_of(model.model.layers[0])
    codes.data = codes.data.view(-1, 2).flip(1).reshape(codes.shape).contiguous()


def shift_codes(model: Any) -> None:
    """Codes that are not where their block is."""
    for layer in model.model.layers:
        codes = codes_of(layer)
        codes.data = codes.data.roll(16, 0).contiguous()


def put_the_original_back(model: Any) -> None:
    layer = model.model.layers[2].mlp
    layer.down_proj = layer.down_proj.original


def cut_a_branch(model: Any) -> None:
    """A site whose code lost its adapter, though the tensors are there."""
    from surgery.graph.module import Rewritten, without

    site = model.model.layers[0].self_attn.v_proj
    assert isinstance(site, Rewritten)
    object.__setattr__(site, "full", without(site.full, {"default"}))
    site.graph = site.full


@pytest.mark.parametrize(
    ("fault", "promise"),
    [
        (revive_a_weight, "exact_sparsity"),
        (write_to_a_norm, "frame"),
        (train_the_base, "frame"),
        (repack_codes, "frame"),
        (shift_codes, "exact_codes"),
        (put_the_original_back, "complete"),
        (cut_a_branch, "complete"),
    ],
)
def test_faults_are_seen(fault: Callable[[Any], None], promise: str) -> None:
    model = transformed()
    fault(model)
    report = surgery.verify(model)
    assert not report
    assert promise in {finding.promise for finding in report.failures}, str(report)


def test_a_trained_model_is_still_green() -> None:
    model = transformed("lora rank 2 on attn.q,v; prefix 3 gated on all layers")
    with torch.no_grad():
        for name, parameter in surgery.parameters(model).items():
            parameter.copy_(torch.randn(parameter.shape, generator=zoo.seeded(0, name)))
    report = surgery.verify(model)
    assert report, str(report)
    assert all(finding.status == "holds" for finding in report.of("identity_at_init"))


def test_a_loaded_and_a_copied_and_a_cast_model_are_still_green(tmp_path: Any) -> None:
    import copy

    model = transformed()
    surgery.save(model, tmp_path / "out")
    for each in (surgery.load(tmp_path / "out"), copy.deepcopy(model)):
        report = surgery.verify(each)
        assert report, str(report)
    assert surgery.verify(transformed("lora rank 2 on attn.q,v").to(torch.bfloat16))


def test_plain_modules_are_checked_place_by_place_and_as_a_whole_when_inputs_are_given() -> None:
    one = zoo.specimen("nano")
    model = surgery.apply(
        surgery.parse("lora rank 2 on attn.q,v; prefix 3 on all layers"), one.model, example_inputs=one.example
    )
    report = surgery.verify(model)
    assert report, str(report)
    assert {finding.status for finding in report.of("off_means_off")} == {"holds", "skipped"}
    whole = surgery.verify(model, example_inputs=one.example)
    assert {finding.status for finding in whole.of("off_means_off")} == {"holds"}


def test_a_prefix_from_a_text_is_held_to_its_text() -> None:
    model = reference_decoder(Shape(positions="learned"))
    tokens, tokenizer = zoo.tokens(model.shape.vocabulary), zoo.tokenizer(model.shape.vocabulary)
    program = surgery.parse('prefix init text "w4 w9" on all layers')
    surgery.apply(program, model, example_inputs=(tokens,), tokenizer=tokenizer)
    (finding,) = surgery.verify(model, example_inputs=(tokens,), tokenizer=tokenizer).of("soft_equals_hard")
    assert finding.status == "holds"
    (finding,) = surgery.verify(model, example_inputs=(tokens,)).of("soft_equals_hard")
    assert "tokenizer" in finding.skipped
    hooks = model.position._forward_pre_hooks
    kept = dict(hooks)
    hooks.clear()
    (finding,) = surgery.verify(model, example_inputs=(tokens,), tokenizer=tokenizer).of("soft_equals_hard")
    assert finding.status == "fails", "positions are not shifted"
    hooks.update(kept)
    with torch.no_grad():
        next(iter(surgery.parameters(model).values())).add_(0.1)
    (finding,) = surgery.verify(model, example_inputs=(tokens,), tokenizer=tokenizer).of("soft_equals_hard")
    assert "trained" in finding.skipped


def test_a_model_without_a_program_is_refused() -> None:
    with pytest.raises(surgery.SurgeryError, match="S501"):
        surgery.verify(zoo.tiny("llama"))


def test_an_unknown_promise_is_said_to_be_unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    from surgery.operations.lora import Lora

    monkeypatch.setattr(Lora, "promises", lambda self: ("merges", "cures_everything"))
    report = surgery.verify(transformed("lora rank 2 on attn.q"))
    assert report.of("cures_everything")[0].status == "skipped"


def test_a_model_that_lies_across_addresses_is_still_green() -> None:
    """Tensors of a mapped file start anywhere, where kernels may sum in another order; nothing is moved for good."""
    model = surgery.apply(surgery.parse("prompt 3 init normal"), zoo.tiny("mixtral"))
    for tensor in model.parameters():
        room = torch.empty(tensor.numel() + 16, dtype=tensor.dtype)
        start = (8 - room.data_ptr() % 64) // tensor.element_size() % (64 // tensor.element_size())
        tensor.data = room[start : start + tensor.numel()].view(tensor.shape).copy_(tensor.data)
    places = [tensor.data_ptr() for tensor in model.parameters()]
    assert all(place % 64 for place in places)
    report = surgery.verify(model)
    assert report, str(report)
    assert report.of("round_trip")
    assert [tensor.data_ptr() for tensor in model.parameters()] == places


def test_a_convolution_over_one_position_has_the_planned_width() -> None:
    sizes = {"hidden_size": 24, "embedding_size": 24, "num_attention_heads": 2, "intermediate_size": 16}
    groups = {f"{name}_groups": 2 for name in ("q", "k", "v", "post_attention", "intermediate", "output")}
    model = SqueezeBertForMaskedLM(SqueezeBertConfig(vocab_size=61, num_hidden_layers=3, **sizes, **groups)).eval()
    report = surgery.verify(surgery.apply(surgery.parse("drop layers 1"), model))
    assert report, str(report)
    assert report.of("complete")
    del model.transformer.encoder.layers[1]
    assert not surgery.verify(model)
