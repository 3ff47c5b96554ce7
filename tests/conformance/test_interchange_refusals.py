"""What PEFT's format cannot say, and what of it we cannot, is an error that says what and why; nothing is written."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import surgery
from surgery.errors import CheckpointError
from tests import zoo
from tests.conformance.test_interchange import trained


@pytest.mark.parametrize(
    ("family", "program", "said"),
    [
        ("llama", "lora rank 2 on attn.q; prefix 3 on all layers", "are one adapter"),
        ("llama", "lora rank 2 on attn.q; prune magnitude 50% on ffn", "changes the base"),
        ("llama", "lora rank 2 init pissa on attn.q", "surgery merge"),
        ("llama", "adapter bottleneck 4 after ffn", "none of PEFT's methods"),
        ("llama", "prefix 3 gated on all layers", "the gate of"),
        ("llama", "prefix 3 on layers 1", "every layer"),
        ("t5", "prefix 3 on all layers", "in decoder"),
        ("t5", "prompt 3 init normal in decoder", "the encoder's"),
        ("llama", "lora rank 2 dora on attn.q; lora rank 2 on attn.v", "DoRA"),
        ("llama", "lora rank 2 dropout 10% on attn.q; lora rank 2 on attn.v", "dropout"),
        ("gpt_oss", "lora rank 2 dora on attn.q + router", "bare parameter"),
        ("llama", "lora rank 2 on attn.q; ia3 on ffn.down as x; train norm", "2 adapters"),
        ("llama", "lora rank 2 on attn.q; train attn.q", "one or the other"),
        ("llama", "lora rank 2 on attn.q; train add on bias in attn.v", "plain LoRA only"),
        ("llama", "quantize base nf4", "no adapter"),
        ("llama", "train norm", "no adapter"),
    ],
)
def test_what_the_format_cannot_say_is_refused(family: str, program: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=said) as caught:
        surgery.export(trained(family, program), tmp_path / "out", to="peft")
    assert caught.value.diagnostics[0].code == "S451"
    assert not list(tmp_path.iterdir())


def refused(directory: Path, said: str, family: str = "llama", code: str = "S452") -> None:
    """The import is an error of these words, and the base is as it was."""
    model = zoo.tiny(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=said) as caught:
        surgery.import_peft(directory, model)
    assert caught.value.diagnostics[0].code == code
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "LOHA"}, "LORA, IA3"),
        ({"peft_type": ["LORA"]}, "LORA, IA3"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"kasa_config": {"x": 1}}, "kasa_config"),
        ({"tomorrow": 3}, "tomorrow"),
        ({"r": 5}, "rank 2"),
    ],
)
def test_a_configuration_that_says_more_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    surgery.export(trained("llama", "lora rank 2 on attn.q"), tmp_path / "out", to="peft")
    path = tmp_path / "out" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refused(tmp_path / "out", said)


Q0, Q1 = (f"base_model.model.model.layers.{i}.self_attn.q_proj" for i in (0, 1))
Change = Callable[[dict[str, Tensor]], Any]
CHANGES: dict[str, tuple[str, Change, str]] = {
    "half": ("lora rank 2 on attn.q", lambda t: t.pop(f"{Q1}.lora_B.weight"), "half an adapter"),
    "other tensor": ("lora rank 2 on attn.q", lambda t: t.update(x=torch.ones(1)), "not of a LoRA"),
    "no module": ("lora rank 2 on attn.q", lambda t: _renamed(t, "layers.0", "layers.9"), "no module"),
    "wide": ("lora rank 2 on attn.q", lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(2, 25)}), "2 x 25"),
    "base": (
        "lora rank 2 on attn.q",
        lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(61, 24)}),
        "replaces the base's lm_head.weight",
    ),
    "magnitude": (
        "lora rank 2 dora on attn.q",
        lambda t: t.pop(f"{Q0}.lora_magnitude_vector"),
        "lora_magnitude|dora|DoRA",
    ),
    "vector": ("ia3 on attn.q", lambda t: t.update({f"{Q0}.ia3_l": torch.ones(1, 24)}), "no vector"),
    "rows": ("prompt 4 init normal", lambda t: t.update(prompt_embeddings=torch.ones(5, 24)), "5 rows"),
    "width": ("prompt 4 init normal", lambda t: t.update(prompt_embeddings=torch.ones(4, 23)), "4 x 23"),
    "table": ("prefix 4 on all layers", lambda t: t.update(prompt_embeddings=torch.ones(4, 71)), "4 x 71"),
    "name": ("prefix 4 on all layers", lambda t: t.update(other=torch.ones(4)), "where a table"),
}


def _renamed(tensors: dict[str, Tensor], old: str, new: str) -> None:
    for name in list(tensors):
        tensors[name.replace(old, new)] = tensors.pop(name)


@pytest.mark.parametrize("name", CHANGES)
def test_tensors_that_do_not_fit_are_refused(name: str, tmp_path: Path) -> None:
    program, change, said = CHANGES[name]
    surgery.export(trained("llama", program), tmp_path / "out", to="peft")
    path = tmp_path / "out" / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    if name == "magnitude":
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert config["use_dora"]
    refused(tmp_path / "out", said)


@pytest.mark.parametrize(
    ("program", "said"),
    [("lora rank 2 on attn.q", "no module"), ("prefix 3 on all layers", "q_proj|takes|layers"), ("ia3", "no module")],
)
def test_an_adapter_of_another_base_is_refused(program: str, said: str, tmp_path: Path) -> None:
    surgery.export(trained("llama", program), tmp_path / "out", to="peft")
    refused(tmp_path / "out", said, "gpt2")


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    surgery.export(trained("llama", "lora rank 2 on attn.q"), tmp_path / "out", to="peft")
    weights = tmp_path / "out" / "adapter_model.safetensors"
    torch.save(load_file(weights), tmp_path / "out" / "adapter_model.bin")
    weights.unlink()
    refused(tmp_path / "out", "only adapter_model.safetensors", code="S413")


def test_a_folder_of_named_adapters_says_where_to_look(tmp_path: Path) -> None:
    surgery.export(trained("llama", "lora rank 2 on attn.q as french"), tmp_path / "out", to="peft")
    refused(tmp_path / "out", "a folder of that name")


def test_a_tied_head_of_its_own_is_refused(tmp_path: Path) -> None:
    """PEFT unties what it copies; a program of ours trains one tensor in both places."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(zoo.tiny("qwen2"), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        theirs.base_model.model.lm_head.modules_to_save["default"].weight.add_(1)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    refused(tmp_path / "theirs", "embed_tokens.weight as well", "qwen2")
