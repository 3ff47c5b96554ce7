"""Prompts on attention of every kind: behind caches, in windows, with linear biases; in second programs; verified."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import surgery
from surgery.errors import SurgeryError
from tests import others, studied, zoo
from tests.texts import IDS, TEXT, ids_of, in_front


@torch.no_grad()
@pytest.mark.parametrize("program", [f'prompt init text "{TEXT}"', f'instruct "{TEXT}" cached'])
@pytest.mark.parametrize("family", ["bloom", "falcon-alibi", "gptj", "mpt", "mistral", "gemma3", "deepseek_v2", "ctrl"])
def test_the_text_by_hand(family: str, program: str) -> None:
    """Promise: soft equals hard, to 1e-5 of the largest logit in float32, however the model computes its attention."""
    model, x = others.tiny(family), zoo.tokens(50, 2, 7)
    prompted = model(input_ids=in_front(x)).logits[:, IDS.shape[1] :]
    model = surgery.apply(surgery.parse(program), model, tokenizer=ids_of)
    assert (model(input_ids=x).logits - prompted).abs().max() < 1e-5 * prompted.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("program", ["prompt 3", "ptuning v1 3 via mlp 4", "prompt 3; lora rank 1 on embed"])
def test_scaled_in_place(program: str) -> None:
    """A model that scales the embeddings it is given, as CTRL does, scales no parameter: every call gives the same."""
    model, x = surgery.apply(surgery.parse(program), others.tiny("ctrl")), zoo.tokens(50, 2, 7)
    for tensor in surgery.parameters(model).values():
        tensor.add_(0.3)
    held = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = model(input_ids=x).logits
    assert torch.equal(model(input_ids=x).logits, first)
    assert all(torch.equal(tensor, held[name]) for name, tensor in model.state_dict().items())
    merged = surgery.merge(model) if "ptuning" in program else model
    for _ in range(2):
        assert torch.allclose(merged(input_ids=x).logits, first, atol=1e-6)


def test_layers_without_attention_are_refused_and_chunks_are_said() -> None:
    """Promise: where a prompt cannot be what its tokens would be, the plan says so."""
    with pytest.raises(SurgeryError, match="S112"):
        surgery.plan(surgery.parse("prompt 3"), others.tiny("jamba"))
    plan = surgery.plan(surgery.parse("prompt 3"), others.tiny("llama4"))
    assert any("chunks" in warning for warning in plan.warnings)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_reentrant_checkpoints_are_refused() -> None:
    """Promise: a checkpoint that would cut the prompt off says so, and which to take."""
    model, x = studied.apply("prompt 3", "llama", zoo.tiny("llama")).train(), zoo.tokens(50, 2, 7)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(SurgeryError, match="S367"):
        model(input_ids=x, labels=x, use_cache=False).loss.backward()


@torch.no_grad()
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("prompt 3", "lora rank 2 on attn.q"),
        ("quantize base nf4", "prompt 3"),
        ("quantize base int8", "prompt 3"),
        (f'instruct "{TEXT}" cached', "prefix 2"),
        ("ptuning v1 3 via mlp 4", f'instruct "{TEXT}"'),
    ],
)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_two_programs_are_one(family: str, first: str, second: str) -> None:
    """Promise: a second program on a transformed model keeps what was trained, and gives what one program gives."""
    if family == "bert" and "cached" in first:
        return
    x = zoo.tokens(50, 2, 7)

    def applied(program: str, model: Any) -> Any:
        return surgery.apply(surgery.parse(program), model, tokenizer=ids_of)

    model = applied(first, zoo.tiny(family))
    for parameter in surgery.parameters(model).values():
        parameter.add_(0.1)
    model = applied(second, model)
    both = applied(f"{first}; {second}", zoo.tiny(family))
    for path, parameter in surgery.parameters(both).items():
        parameter.copy_(surgery.parameters(model)[path])
    wanted = both(input_ids=x).logits
    assert (model(input_ids=x).logits - wanted).abs().max() < 1e-6 * wanted.abs().max()


@pytest.mark.parametrize("program", [f'instruct "{TEXT}"', f'prompt init text "{TEXT}"', "ptuning v1 3 via lstm 4"])
def test_verified(program: str) -> None:
    """Promise: `surgery verify` checks what is promised, soft against hard included, and finds it kept."""
    model = studied.apply(program, "llama", zoo.tiny("llama"), ids_of)
    report = surgery.verify(model, tokenizer=ids_of)
    assert report, str(report)
    checked = [finding for finding in report.of("soft_equals_hard") if not finding.skipped]
    assert len(checked) == ("init" in program or "instruct" in program)
