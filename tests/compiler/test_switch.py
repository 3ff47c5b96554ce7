"""Adapters by name: which run, which are trained, and what of it a saved model remembers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import surgery
from surgery.errors import CheckpointError
from tests import zoo
from tests.compiler.test_route import transformed

PROGRAM = "lora rank 2 on attn as french\nlora rank 3 on ffn as german\nprefix 2 gated on all layers"


def wanting(model: torch.nn.Module) -> set[str]:
    """Names of the tensors that want gradients, without their places."""
    return {name.rpartition(".")[2] for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_only_what_runs_is_trained() -> None:
    """`activate` lets the others rest, and gives them back what they wanted; a tensor frozen by hand stays frozen."""
    model = transformed(PROGRAM, zoo.tiny("llama"))
    everything = wanting(model)
    assert surgery.active(model) == ("default", "french", "german")
    surgery.activate(model, "french")
    assert surgery.active(model) == ("french",)
    assert wanting(model) == {"french_lora_A", "french_lora_B"}
    surgery.activate(model, "german", "default")
    assert wanting(model) == everything - {"french_lora_A", "french_lora_B"}
    for name, parameter in surgery.parameters(model).items():
        if name.endswith("german_lora_A"):
            parameter.requires_grad_(False)
    surgery.activate(model, "french")
    surgery.activate(model)
    assert wanting(model) == everything - {"german_lora_A"}
    with surgery.disabled(model):
        assert surgery.active(model) == ()
        assert wanting(model) == everything - {"german_lora_A"}
    assert surgery.active(model) == ("default", "french", "german")


def test_a_network_that_several_layers_share_rests_only_with_all_of_them() -> None:
    model = transformed("prefix 3 via mlp 4 on all layers as near\nlora rank 2 on attn as far", zoo.tiny("llama"))
    surgery.activate(model, "far")
    assert wanting(model) == {"far_lora_A", "far_lora_B"}
    surgery.activate(model, "near")
    assert "near_prefix_embedding" in wanting(model)
    assert "far_lora_A" not in wanting(model)


def test_a_saved_model_keeps_what_is_off(tmp_path: Path) -> None:
    """round_trip: the same logits, the same adapters on, and the same tensors trained once they are on again."""
    model = transformed(PROGRAM, zoo.tiny("llama"))
    fed = zoo.inputs(model)
    everything, both = wanting(model), zoo.logits(model, fed)
    surgery.activate(model, "german")
    wanted = zoo.logits(model, fed)
    surgery.save(model, tmp_path / "out")
    for again in (surgery.load(tmp_path / "out"), copy.deepcopy(model)):
        assert surgery.active(again) == ("german",)
        assert torch.equal(zoo.logits(again, fed), wanted)
        assert not torch.equal(wanted, both)
        assert wanting(again) == {"german_lora_A", "german_lora_B"}
        assert surgery.verify(again)
        surgery.activate(again)
        assert torch.equal(zoo.logits(again, fed), both)
        assert wanting(again) == everything


def test_a_manifest_that_switches_off_what_is_not_there(tmp_path: Path) -> None:
    model = transformed(PROGRAM, zoo.tiny("llama"))
    surgery.activate(model, "german")
    surgery.save(model, tmp_path / "out")
    manifest = tmp_path / "out" / "surgery.json"
    text = manifest.read_text("utf-8")
    assert '"inactive": ["default"' in text
    manifest.write_text(text.replace('"inactive": ["default"', '"inactive": ["spanish"'), "utf-8")
    with pytest.raises(CheckpointError, match="`spanish`"):
        surgery.load(tmp_path / "out")


def test_switching_back_and_forth_is_quick_and_keeps_the_code() -> None:
    """The code of a state is made once: activate costs no compilation the second time."""
    model = transformed(PROGRAM, zoo.tiny("llama"))
    surgery.activate(model, "french")
    first = {id(type(module).forward) for _, module in model.named_modules() if hasattr(module, "full")}
    surgery.activate(model)
    surgery.activate(model, "french")
    assert {id(type(module).forward) for _, module in model.named_modules() if hasattr(module, "full")} == first
