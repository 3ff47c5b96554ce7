"""The zoo keeps its word: same seed, same bits; nothing at a trivial value; nothing else disturbed."""

from __future__ import annotations

import pytest
import torch

from tests import zoo


@pytest.mark.parametrize("name", zoo.FAMILIES + zoo.PLAIN)
def test_every_model_runs_and_depends_on_its_seed(name: str) -> None:
    before = torch.get_rng_state()
    first, again, other = zoo.specimen(name), zoo.specimen(name), zoo.specimen(name, seed=1)
    assert torch.equal(before, torch.get_rng_state()) or name in zoo.PLAIN
    assert torch.equal(first.logits(), again.logits())
    assert not torch.equal(first.logits(), zoo.logits(other.model, first.inputs))
    assert first.logits().isfinite().all()
    assert first.logits().std() > 0.05, "logits near zero would let any error pass"


@pytest.mark.parametrize("name", zoo.FAMILIES + zoo.PLAIN)
def test_no_parameter_hides_mistakes(name: str) -> None:
    for path, parameter in zoo.specimen(name).model.named_parameters():
        assert parameter.float().std() > 0, f"{path} is constant"


@pytest.mark.parametrize("name", zoo.CAUSAL + zoo.PLAIN)
def test_causal_models_are_causal(name: str) -> None:
    one = zoo.specimen(name)
    logits = one.logits()
    ids = one.inputs[0] if isinstance(one.inputs, tuple) else one.inputs["input_ids"]
    ids[:, -1] = (ids[:, -1] - 3 + 1) % 40 + 3
    changed = one.logits()
    assert torch.allclose(logits[:, :-1], changed[:, :-1], atol=1e-6)
    assert not torch.allclose(logits[:, -1], changed[:, -1], atol=1e-4)


def test_tokenizer_round_trip() -> None:
    tokenizer = zoo.tokenizer()
    assert tokenizer("w5 w17 w50").input_ids == [5, 17, 50]


def test_minilm_is_the_pretrained_encoder(minilm: torch.nn.Module) -> None:
    assert sum(p.numel() for p in minilm.parameters()) == 22_713_216


def test_smollm2_is_unpacked_once(smollm2: torch.nn.Module, smollm2_tokenizer: object) -> None:
    assert sum(p.numel() for p in smollm2.parameters()) == 134_515_008
    assert getattr(smollm2.config, "quantization_config", None) is None
    ids = smollm2_tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        best = smollm2(ids).logits[0, -1].argmax()
    assert smollm2_tokenizer.decode(best).strip() == "Paris"
