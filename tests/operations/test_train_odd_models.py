"""`train` where tensors are not where a plain decoder has them: experts, state spaces, layers shared, biases shared."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from tests import zoo

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 50}
HEADS = {"num_attention_heads": 4, "intermediate_size": 24}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral": ("ForCausalLM", {**SMALL, **HEADS, "num_key_value_heads": 2, "num_local_experts": 4}),
    "GptOss": ("ForCausalLM", {**SMALL, **HEADS, "num_key_value_heads": 2, "num_local_experts": 4, "head_dim": 8}),
    "Albert": ("ForMaskedLM", {**SMALL, **HEADS, "embedding_size": 16}),
    "Bert": ("ForMaskedLM", {**SMALL, **HEADS}),
    "Mamba": ("ForCausalLM", SMALL),
}


def model(name: str) -> Any:
    import transformers

    kind, fields = MODELS[name]
    made = getattr(transformers, name + kind)(getattr(transformers, f"{name}Config")(**fields))
    zoo.fill(made, 0)
    return made.eval()


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Models say which of their optional kernels are missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def trained(model: nn.Module) -> set[str]:
    return {name for name, tensor in model.named_parameters() if tensor.requires_grad}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "program", ["train bias add", "train layers -1", "train all linear\nfreeze bias", "train head"]
)
def test_counts_frames_and_files(name: str, program: str, tmp_path: Any) -> None:
    """The plan's count, the frame and the round trip hold, ties counted once."""
    one = model(name)
    plan = surgery.plan(surgery.parse(program), one)
    surgery.apply(plan, one)
    assert trained(one) == set(surgery.parameters(one))
    assert sum(tensor.numel() for tensor in surgery.parameters(one).values()) == plan.cost.trainable > 0
    with torch.no_grad():
        for tensor in surgery.parameters(one).values():
            tensor.add_(0.1)
    assert all(finding.status == "holds" for finding in surgery.verify(one).of("frame"))
    surgery.save(one, tmp_path / "out")
    loaded = surgery.load(tmp_path / "out")
    assert trained(loaded) == trained(one)
    assert all(torch.equal(tensor, loaded.get_parameter(name)) for name, tensor in one.named_parameters())


@pytest.mark.parametrize("name", ["GptOss", "Albert", "Bert", "Mamba"])
def test_bias_means_every_bias(name: str) -> None:
    """Also of experts' stacks and of convolutions; not what other tensors are called."""
    one = model(name)
    surgery.apply(surgery.parse("train bias"), one)
    names = {name for name, _ in one.named_parameters()}
    assert trained(one) == {name for name in names if name.rpartition(".")[2] in ("bias", *EXPERTS)} != set()


EXPERTS = ("gate_up_proj_bias", "down_proj_bias")


def test_layers_mean_tensors_without_a_role_too() -> None:
    """A state-space layer's A and D, an attention's sinks."""
    for name, local in (("Mamba", ("A_log", "D")), ("GptOss", ("sinks",))):
        one = model(name)
        surgery.apply(surgery.parse("train layers 0"), one)
        found = {each.rpartition(".")[2] for each in trained(one)}
        assert set(local) <= found, name


def test_a_head_s_bias_that_is_shared_is_trained_with_it() -> None:
    one = model("Bert")
    plan = surgery.plan(surgery.parse("train head"), one)
    surgery.apply(plan, one)
    assert trained(one) == {"bert.embeddings.word_embeddings.weight", "cls.predictions.bias"}
    assert sum("share" in warning for warning in plan.warnings) == 2
