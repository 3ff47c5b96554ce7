"""A merge that streams gives the very bytes of one in memory, and says no where it takes the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import surgery
from surgery.checkpoint.inventory import inventory
from surgery.checkpoint.merging import merged_shapes, stream_merge
from surgery.checkpoint.save import save_merged
from surgery.errors import CheckpointError
from tests import zoo
from tests.checkpoint.test_streaming import files

PROGRAMS = {
    "lora": "lora rank 2 on all linear",
    "codes": "quantize base nf4 double; lora rank 3 dora on attn",
    "zeros": "prune magnitude 50% on ffn; ia3",
    "eight": "quantize base int8; prune magnitude 50% on ffn; lora rank 3 on attn",
    "trained": "train ffn; lora rank 2 on ffn",
    "roles": "lora rank 2 on attn.q,v as one; lora rank 1 scale rs on attn.q + ffn as two",
}
FAMILIES = ("llama", "gpt2", "qwen2", "phi3", "bert", "t5")
QUICK = [
    ("lora", "gpt2"),
    ("codes", "llama"),
    ("zeros", "bert"),
    ("eight", "qwen2"),
    ("trained", "t5"),
    ("roles", "phi3"),
]
PAIRS = [(name, family) for name in PROGRAMS for family in FAMILIES]


def adapted(program: str, family: str, place: Path, *, standalone: bool = False) -> Path:
    """A base in shards, and what the program made of it, trained."""
    dtype = torch.bfloat16 if family in ("llama", "gpt2") else torch.float32
    zoo.tiny(family, dtype=dtype).save_pretrained(place / "base", max_shard_size="20KB")
    from surgery.checkpoint.models import load

    loaded = load(str(place / "base"))
    model = surgery.apply(surgery.parse(program), loaded.model)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(surgery.parameters(model).items()):
        assert parameter.requires_grad, name
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    surgery.save(model, place / "out", origin=loaded.origin, standalone=standalone)
    return place / "out"


@pytest.mark.parametrize(
    ("name", "family"), [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow) for pair in PAIRS]
)
def test_same_bytes_for_every_family(name: str, family: str, tmp_path: Path) -> None:
    out = adapted(PROGRAMS[name], family, tmp_path)
    shapes = merged_shapes(out)
    assert shapes is not None
    stream_merge(out, shapes, tmp_path / "stream", force=False)
    merged = surgery.merge(surgery.load(out))
    save_merged(merged, tmp_path / "live", source=out, origin=str(tmp_path / "base"))
    live, streamed = files(tmp_path / "live"), files(tmp_path / "stream")
    assert list(live) == list(streamed)
    assert [file for file in live if live[file] != streamed[file]] == []
    theirs, base = (type(merged).from_pretrained(tmp_path / where) for where in ("stream", "base"))
    moved = 0
    for key, held in inventory(merged).items():
        if held.parameter:
            assert torch.equal(theirs.get_parameter(key), held.tensor)
            moved += not torch.equal(base.get_parameter(key), held.tensor)
    assert moved > 3


@pytest.mark.parametrize(
    ("program", "family"),
    [
        ("lora rank 2 on embed", "qwen2"),  # tied: the head takes the table along
        ("lora rank 2 on attn.q; prefix 3 on all layers", "llama"),
        ("adapter bottleneck 2 after ffn", "llama"),
        ("lora rank 2 on experts", "mixtral"),
    ],
)
def test_what_takes_the_whole_model(program: str, family: str, tmp_path: Path) -> None:
    assert merged_shapes(adapted(program, family, tmp_path)) is None


def test_a_tensor_that_is_not_what_was_saved(tmp_path: Path) -> None:
    out = adapted(PROGRAMS["lora"], "llama", tmp_path, standalone=True)
    path = sorted(out.glob("model*.safetensors"))[-1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    shapes = merged_shapes(out)
    assert shapes is not None
    with pytest.raises(CheckpointError, match="S412"):
        stream_merge(out, shapes, tmp_path / "stream", force=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]
