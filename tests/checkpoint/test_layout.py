"""Files are laid out from shapes alone, and whoever writes into them gets files that everybody reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import surgery
from surgery.checkpoint import layout as layouts
from surgery.checkpoint.header import INDEX, check_checkpoint, read_header
from surgery.checkpoint.layout import Slot, layout, shards
from surgery.checkpoint.sink import Sink, fill
from surgery.graph.codes import dequantize_4bit
from tests.checkpoint.test_tensors import some


def slots_of(tensors: dict[str, torch.Tensor]) -> list[Slot]:
    from surgery.checkpoint.tensors import slot_of

    return [slot_of(name, tensor) for name, tensor in tensors.items()]


def test_any_order_gives_the_same_file(tmp_path: Path) -> None:
    tensors = some()
    file = layout("x.safetensors", slots_of(tensors))
    for order in (list(tensors), list(tensors)[::-1]):
        with Sink(tmp_path, [file]) as sink:
            for name in order:
                sink.put(name, tensors[name])
            sink.finish()
        (tmp_path / "x.safetensors").rename(tmp_path / str(order[0]))
    assert (tmp_path / "f64").read_bytes() == (tmp_path / "strided").read_bytes()
    read = load_file(tmp_path / "f64")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("said", [b"{}", b'{"offset": 0.0071}', b"x" * 40])
def test_what_is_late_may_be_shorter_than_was_feared(said: bytes, tmp_path: Path) -> None:
    slots = [Slot("late", "U8", (40,), late=True), *slots_of({"a": torch.arange(5.0), "b": torch.arange(3)})]
    fill(tmp_path, [layout("x.safetensors", slots)], {"late": said, "a": torch.arange(5.0), "b": torch.arange(3)}, id)
    read = load_file(tmp_path / "x.safetensors")
    assert bytes(read["late"].tolist()) == said
    assert torch.equal(read["a"], torch.arange(5.0))
    assert [tensor.name for tensor in read_header(tmp_path / "x.safetensors").tensors] == ["b", "a", "late"]


def test_shards_keep_groups_whole_and_the_order() -> None:
    sizes = {"a.x": 30, "a.y": 30, "b.x": 50, "c.x": 200, "d.x": 10}
    slots = [Slot(name, "U8", (size,), name[0]) for name, size in sizes.items()]
    found = shards(slots, 100)
    assert [[slot.name for slot in file.slots] for file in found] == [["a.x", "a.y"], ["b.x"], ["c.x"], ["d.x"]]
    assert [file.name for file in found][-1] == "model-00004-of-00004.safetensors"
    assert [file.name for file in shards(slots, 1000)] == ["model.safetensors"]


def small(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        **options,
    )
    return LlamaForCausalLM(config).eval()


def widened(parameter: Any) -> torch.Tensor:
    """What bitsandbytes' own parameter stands for. (Its kernels take rows of other widths than 64 for others.)"""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return parameter.detach()  # type: ignore[no-any-return]
    nested = (state.state2.absmax, state.state2.code, state.offset)
    facts = (state.quant_type, state.blocksize, tuple(state.shape), state.dtype)
    return dequantize_4bit(parameter.data, state.absmax, *nested, *facts)


@pytest.mark.parametrize("program", ["quantize base nf4 double", "prune magnitude 50% on ffn; lora rank 2 on attn.q"])
def test_a_sharded_result_loads_everywhere(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "SHARD", 30_000)
    model = surgery.apply(surgery.parse(program), small())
    surgery.save(model, tmp_path / "out")
    files = [header.path.name for header in check_checkpoint(tmp_path / "out")]
    assert len(files) > 2
    assert set(json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"].values()) == set(files)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ours, expected = surgery.load(tmp_path / "out"), surgery.merge(model)
    for name, weight in surgery.merge(ours).named_parameters():
        assert torch.equal(weight, expected.get_parameter(name))
        assert torch.equal(weight, widened(theirs.get_parameter(name)))
