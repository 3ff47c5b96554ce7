"""Saved and loaded is the same model: same bits, same logits, same ties, same trainable tensors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.checkpoint.inventory import inventory
from surgery.checkpoint.manifest import FORMAT
from surgery.errors import CheckpointError
from surgery.verify.bounds import relative_error
from tests import zoo

PROGRAMS = {
    "lora": "lora rank 2 on all linear + embed",
    "named": "lora rank 2 on attn.q as french\nlora rank 3 dropout 5% on attn.q as german",
    "dora": "lora rank 2 dora scale rs on attn.q,v",
    "prefix": "prefix 3 on all layers",
    "network": "prefix 3 via mlp 5 on all layers",
    "gated": "prefix 3 gated on all layers",
    "pruned": "prune magnitude 50% on ffn",
    "quantized": "quantize base nf4 double",
    "eight": "quantize base int8",
    "all": "quantize base nf4 double\nlora rank 2 on attn.q,v\nprefix 3 on all layers\nprune magnitude 50% on ffn",
}


def randomised(model: Any) -> Any:
    """What is trained filled with noise, so that a tensor that is not restored shows."""
    with torch.no_grad():
        for name, parameter in surgery.parameters(model).items():
            parameter.copy_(torch.randn(parameter.shape, generator=zoo.seeded(7, name)) / 8)
    return model


def bits(model: Any) -> dict[str, torch.Tensor]:
    return {name: held.tensor.detach().clone() for name, held in inventory(model).items()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), b[name].reshape(-1).view(torch.uint8)), name


def round_trip(specimen: zoo.Specimen, program: str, path: Path, base: Any = None) -> Any:
    model = surgery.apply(surgery.parse(program), specimen.model, example_inputs=specimen.example)
    randomised(model)
    surgery.save(model, path)
    loaded = surgery.load(path, model=base)
    same_bits(bits(model), bits(loaded))
    assert torch.equal(zoo.logits(model, specimen.inputs), zoo.logits(loaded, specimen.inputs))
    trained = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return loaded


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_method_comes_back(family: str, program: str, tmp_path: Path) -> None:
    specimen = zoo.specimen(family)
    before = specimen.logits()
    loaded = round_trip(specimen, PROGRAMS[program], tmp_path / "out")
    assert type(loaded) is type(specimen.model)
    assert not torch.equal(zoo.logits(loaded, specimen.inputs), before), "the program did nothing"


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_every_family_comes_back(family: str, tmp_path: Path) -> None:
    loaded = round_trip(zoo.specimen(family), "lora rank 2 on all linear", tmp_path / "out")
    with surgery.disabled(loaded):
        assert torch.equal(zoo.logits(loaded, zoo.inputs(loaded)), zoo.specimen(family).logits())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    """Also where the buffers were cast with the rest: they are saved, not computed again."""
    loaded = round_trip(zoo.specimen("llama", dtype=dtype), PROGRAMS["all"], tmp_path / "out")
    assert loaded.model.norm.weight.dtype == dtype


@pytest.mark.parametrize("name", zoo.PLAIN)
def test_plain_modules_come_back_into_a_base(name: str, tmp_path: Path) -> None:
    round_trip(
        zoo.specimen(name), "lora rank 2 on attn.q,v\nprefix 3 on all layers", tmp_path / "out", zoo.plain(name, seed=5)
    )
    with pytest.raises(CheckpointError) as caught:
        surgery.load(tmp_path / "out")
    assert caught.value.diagnostics[0].code == "S444"


def test_ties_stay_ties(tmp_path: Path) -> None:
    """A tied head is saved once and is the embedding again."""
    specimen = zoo.specimen("qwen2")
    loaded = round_trip(specimen, "lora rank 2 on attn.q", tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_base_tensors_lie_under_base_names(tmp_path: Path) -> None:
    """`from_pretrained` loads a pruned, adapted model by itself: the pruned base, without the adapters."""
    from transformers import AutoModelForCausalLM

    specimen = zoo.specimen("llama")
    base = set(specimen.model.state_dict())
    model = randomised(surgery.apply(surgery.parse(PROGRAMS["lora"] + "\n" + PROGRAMS["pruned"]), specimen.model))
    surgery.save(model, tmp_path / "out")
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == base
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    assert (theirs.model.layers[0].mlp.up_proj.weight == 0).float().mean() == 0.5
    with surgery.disabled(model):
        assert torch.equal(zoo.logits(theirs, specimen.inputs), specimen.logits())


def test_transformers_reads_our_4_bit_weights(tmp_path: Path) -> None:
    """Codes, scales and states stand in the file as bitsandbytes and transformers write them."""
    import bitsandbytes.functional as bnb
    from transformers import AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 8}
    specimen = zoo.specimen("llama", **sizes)
    wide = specimen.model.model.layers[1].mlp.up_proj.weight.detach().clone()
    surgery.save(surgery.apply(surgery.parse("quantize base nf4 double"), specimen.model), tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    weight = theirs.model.layers[1].mlp.up_proj.weight
    codes, state = bnb.quantize_4bit(wide, blocksize=64, compress_statistics=True, quant_type="nf4")
    assert torch.equal(weight.data.view(-1), codes.view(-1))
    assert torch.equal(bnb.dequantize_4bit(weight.data, weight.quant_state), bnb.dequantize_4bit(codes, state))
    assert isinstance(theirs.lm_head, torch.nn.Linear)
    assert theirs.lm_head.weight.is_floating_point()


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("form", ["nf4 double", "fp4"])
def test_transformers_computes_what_we_do_in_4_bits(family: str, form: str, tmp_path: Path) -> None:
    """Rows are whole blocks here: the CPU kernel of bitsandbytes widens others wrongly."""
    from transformers import AutoModelForCausalLM

    sizes = {"hidden_size": 64, "num_attention_heads": 4}
    sizes |= {"ffn_dim": 128, "word_embed_proj_dim": 64} if family == "opt" else {"intermediate_size": 128}
    specimen = zoo.specimen(family, **sizes)
    base = specimen.logits()
    surgery.save(surgery.apply(surgery.parse(f"quantize base {form}"), specimen.model), tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    logits = zoo.logits(theirs.train(), specimen.inputs)  # in evaluation mode it would repack its weights
    assert relative_error(logits, zoo.logits(surgery.load(tmp_path / "out"), specimen.inputs)) < 1e-6
    assert relative_error(logits, base) > 0.02


def test_merged_in_part_comes_back(tmp_path: Path) -> None:
    """A prefix cannot fold: it stays, its network folded, and the directory says just that."""
    specimen = zoo.specimen("llama")
    model = surgery.apply(surgery.parse(PROGRAMS["network"] + "\n" + PROGRAMS["lora"]), specimen.model)
    surgery.save(surgery.merge(randomised(model)), tmp_path / "out")
    loaded = surgery.load(tmp_path / "out")
    same_bits(bits(model), bits(loaded))
    assert torch.equal(specimen.logits(), zoo.logits(loaded, specimen.inputs))
    assert not any("lora" in name for name in bits(loaded))


def test_a_second_round_trip_changes_nothing(tmp_path: Path) -> None:
    """save(load(save(x))) is save(x), byte by byte, but for where it came from."""
    specimen = zoo.specimen("gpt2")
    round_trip(specimen, PROGRAMS["all"], tmp_path / "one")
    surgery.save(surgery.load(tmp_path / "one"), tmp_path / "two")
    assert sorted(os.listdir(tmp_path / "one")) == sorted(os.listdir(tmp_path / "two"))
    for name in ("model.safetensors", "surgery.safetensors", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_training_goes_on_where_it_was(tmp_path: Path) -> None:
    """One step before saving and one after is two steps."""

    def step(model: Any) -> None:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model.train()(**zoo.inputs(model)).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    model = surgery.apply(
        surgery.parse("lora rank 2 on all linear\nprefix 2 via mlp 4 on all layers"), zoo.tiny("llama")
    )
    step(model)
    surgery.save(model, tmp_path / "out")
    loaded = surgery.load(tmp_path / "out")
    step(model)
    step(loaded)
    same_bits(bits(model), bits(loaded))


def test_untransformed_and_weightless_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        surgery.save(zoo.tiny("llama"), tmp_path / "out")
    assert caught.value.diagnostics[0].code == "S421"
    with torch.device("meta"):
        hollow = type(zoo.tiny("llama"))(zoo.config("llama"))
    from surgery.compiler import perform

    plan = surgery.plan(surgery.parse("lora rank 2 on attn.q"), hollow)
    with pytest.raises(CheckpointError) as caught:
        surgery.save(perform(plan, hollow, hollow=True), tmp_path / "out")
    assert caught.value.diagnostics[0].code == "S422"
    assert os.listdir(tmp_path) == []


@pytest.fixture
def out(tmp_path: Path) -> Path:
    model = surgery.apply(surgery.parse("lora rank 2 on attn.q"), zoo.tiny("llama"))
    surgery.save(model, tmp_path / "out")
    return tmp_path / "out"


def refused(path: Path, code: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        surgery.load(path)
    assert caught.value.diagnostics[0].code == code


def edit(path: Path, **changes: Any) -> None:
    data = json.loads((path / "surgery.json").read_text())
    (path / "surgery.json").write_text(json.dumps(data | changes))


def test_one_flipped_bit_is_noticed(out: Path) -> None:
    """Header checks cannot see it: the digests do."""
    with (out / "model.safetensors").open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-3, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    refused(out, "S412")


@pytest.mark.parametrize("said", [{"dtype": "I32"}, {"shape": [24, 2]}])
def test_other_numbers_of_the_same_bytes_are_noticed(said: dict[str, Any], out: Path) -> None:
    """Digests cannot see it: the file says another dtype or shape than was saved."""
    with (out / "surgery.safetensors").open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        name = next(name for name, info in header.items() if info.get("shape") == [2, 24])
        header[name] |= said
        text = json.dumps(header, separators=(",", ":")).encode()
        assert len(text) <= length
        file.seek(8)
        file.write(text.ljust(length))
    refused(out, "S412")


def test_missing_and_unexpected_tensors_are_refused(out: Path) -> None:
    """Nothing is filled in or left out silently."""
    tensors = load_file(out / "surgery.safetensors")
    dropped = dict(list(tensors.items())[1:])
    save_file(dropped, out / "surgery.safetensors")
    refused(out, "S442")
    save_file(tensors | {"more": torch.ones(1)}, out / "surgery.safetensors")
    refused(out, "S442")


def test_manifest_that_does_not_fit_is_refused(out: Path) -> None:
    edit(out, format=FORMAT + 1)
    refused(out, "S441")
    edit(out, format=FORMAT, plan={})
    refused(out, "S440")
    (out / "surgery.json").write_text("[" * 10_000)
    refused(out, "S440")
    (out / "surgery.json").unlink()
    refused(out, "S440")
    refused(out / "nowhere", "S401")


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "3"}, {"format": None}, {"version": 1}, {"program": 3}, {"program": "ia3"}, {"seed": "0"},
        {"plan": {}}, {"plan": {"steps": [1]}}, {"model_class": 3}, {"origin": 3}, {"ties": []}, {"shape": None},
        {"settings": [1]}, {"promises": []}, {"trainable": 3}, {"more": 1},
    ],
)  # fmt: skip
def test_a_manifest_of_other_kinds_is_refused(changes: dict[str, Any], out: Path) -> None:
    edit(out, **changes)
    refused(out, "S440")


@pytest.mark.parametrize("changes", [{"digest": 3}, {"digest": None}, {"key": 4}, {"dtype": 1}, {"shape": 2}])
def test_an_entry_of_other_kinds_is_refused(changes: dict[str, Any], out: Path) -> None:
    tensors = json.loads((out / "surgery.json").read_text())["tensors"]
    tensors[min(tensors)] |= changes
    edit(out, tensors=tensors)
    refused(out, "S440")


def test_manifest_cannot_name_files_elsewhere(out: Path) -> None:
    data = json.loads((out / "surgery.json").read_text())
    for entry in data["tensors"].values():
        entry["file"] = "../other.safetensors"
    edit(out, tensors=data["tensors"])
    refused(out, "S440")


def test_class_of_another_transformers_is_refused(out: Path) -> None:
    edit(out, model_class="transformers.models.nosuch:NoSuchModel")
    refused(out, "S443")


def test_base_that_was_transformed_is_refused(out: Path) -> None:
    model = surgery.apply(surgery.parse("lora rank 2 on attn.q"), zoo.tiny("llama"))
    with pytest.raises(CheckpointError) as caught:
        surgery.load(out, model=model)
    assert caught.value.diagnostics[0].code == "S446"
