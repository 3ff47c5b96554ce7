"""Coupled groups of known models against tables written by hand (promise: by dataflow, no table of architectures)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AlbertConfig, AlbertForMaskedLM

import surgery
from surgery.anatomy.groups import Axis, Group, Kind, joined
from surgery.anatomy.units import coupled
from tests import zoo
from tests.reference_decoder import Shape, reference_decoder

# For a neuron and a head: what reads it, then what else there is of it, each as (tensor in the layer, axis, unit of
# each index as runs of (start, unit, count, neighbours)); then what a key-value group is, and the group of each head.
LLAMA, GPT2, BERT = "model.layers.{}", "transformer.h.{}", "bert.encoder.layer.{}"
NEURONS: dict[str, tuple[str, int, dict[str, tuple[int, list[tuple[int, ...]]]]]] = {
    "llama": (
        LLAMA,
        37,
        {
            "mlp.down_proj.weight": (1, [(0, 0, 37, 1)]),
            "mlp.gate_proj.weight": (0, [(0, 0, 37, 1)]),
            "mlp.up_proj.weight": (0, [(0, 0, 37, 1)]),
        },
    ),
    "phi3": (
        LLAMA,
        43,
        {
            "mlp.down_proj.weight": (1, [(0, 0, 43, 1)]),
            "mlp.gate_up_proj.weight": (0, [(0, 0, 43, 1), (43, 0, 43, 1)]),
        },
    ),
    "gpt2": (
        GPT2,
        38,
        {
            "mlp.c_proj.weight": (0, [(0, 0, 38, 1)]),
            "mlp.c_fc.weight": (1, [(0, 0, 38, 1)]),
            "mlp.c_fc.bias": (0, [(0, 0, 38, 1)]),
        },
    ),
    "gpt_neox": (
        "gpt_neox.layers.{}",
        39,
        {
            "mlp.dense_4h_to_h.weight": (1, [(0, 0, 39, 1)]),
            "mlp.dense_h_to_4h.weight": (0, [(0, 0, 39, 1)]),
            "mlp.dense_h_to_4h.bias": (0, [(0, 0, 39, 1)]),
        },
    ),
    "bert": (
        BERT,
        34,
        {
            "output.dense.weight": (1, [(0, 0, 34, 1)]),
            "intermediate.dense.weight": (0, [(0, 0, 34, 1)]),
            "intermediate.dense.bias": (0, [(0, 0, 34, 1)]),
        },
    ),
    "byhand": (
        "blocks.{}",
        44,
        {
            "drop.weight": (1, [(0, 0, 44, 1)]),
            "lift.weight": (0, [(0, 0, 44, 1)]),
            "lift.bias": (0, [(0, 0, 44, 1)]),
        },
    ),
}
HEADS: dict[str, tuple[str, int, tuple[int, ...], dict[str, tuple[int, list[tuple[int, ...]]]]]] = {
    "llama": (
        LLAMA,
        4,
        (0, 0, 1, 1),
        {
            "self_attn.o_proj.weight": (1, [(0, 0, 4, 6)]),
            "self_attn.q_proj.weight": (0, [(0, 0, 4, 6)]),
            "shared self_attn.k_proj.weight": (0, [(0, 0, 2, 6)]),
            "shared self_attn.v_proj.weight": (0, [(0, 0, 2, 6)]),
        },
    ),
    "qwen2": (  # all heads share one key and value, which are no head's
        LLAMA,
        5,
        (0, 0, 0, 0, 0),
        {
            "self_attn.o_proj.weight": (1, [(0, 0, 5, 4)]),
            "self_attn.q_proj.weight": (0, [(0, 0, 5, 4)]),
            "self_attn.q_proj.bias": (0, [(0, 0, 5, 4)]),
        },
    ),
    "phi3": (
        LLAMA,
        5,
        (0, 0, 0, 0, 0),
        {"self_attn.o_proj.weight": (1, [(0, 0, 5, 6)]), "self_attn.qkv_proj.weight": (0, [(0, 0, 5, 6)])},
    ),
    "gpt2": (
        GPT2,
        3,
        (),
        {
            "attn.c_proj.weight": (0, [(0, 0, 3, 7)]),
            "attn.c_attn.weight": (1, [(0, 0, 3, 7), (21, 0, 3, 7), (42, 0, 3, 7)]),
            "attn.c_attn.bias": (0, [(0, 0, 3, 7), (21, 0, 3, 7), (42, 0, 3, 7)]),
        },
    ),
    "gpt_neox": (  # q, k and v of a head stand next to each other
        "gpt_neox.layers.{}",
        3,
        (),
        {
            "attention.dense.weight": (1, [(0, 0, 3, 8)]),
            "attention.query_key_value.weight": (0, [(0, 0, 3, 24)]),
            "attention.query_key_value.bias": (0, [(0, 0, 3, 24)]),
        },
    ),
    "nano": (
        "blocks.{}",
        3,
        (),
        {
            "out.weight": (1, [(0, 0, 3, 7)]),
            "qkv.weight": (0, [(0, 0, 3, 7), (21, 0, 3, 7), (42, 0, 3, 7)]),
            "qkv.bias": (0, [(0, 0, 3, 7), (21, 0, 3, 7), (42, 0, 3, 7)]),
        },
    ),
    "byhand": (
        "blocks.{}",
        3,
        (),
        {
            "wo.weight": (1, [(0, 0, 3, 7)]),
            "wq.weight": (0, [(0, 0, 3, 7)]),
            "wq.bias": (0, [(0, 0, 3, 7)]),
            "wk.weight": (0, [(0, 0, 3, 7)]),
            "wv.weight": (0, [(0, 0, 3, 7)]),
            "wv.bias": (0, [(0, 0, 3, 7)]),
        },
    ),
}


def facts(group: Group) -> dict[str, tuple[int, list[tuple[int, ...]]]]:
    found = {axis.name: axis for axis in group.axes} | {f"shared {axis.name}": axis for axis in group.shared}
    return {
        name: (axis.axis, [(run.start, run.unit, run.count, run.each) for run in axis.runs])
        for name, axis in found.items()
    }


def of(name: str, kind: Kind) -> list[Group]:
    specimen = zoo.specimen(name)
    groups, refused = coupled(specimen.model, kind, specimen.example)
    assert not refused
    return groups


def placed(wanted: dict[str, Any], layer: str) -> dict[str, Any]:
    return {
        f"shared {layer}.{name.removeprefix('shared ')}" if name.startswith("shared ") else f"{layer}.{name}": said
        for name, said in wanted.items()
    }


@pytest.mark.parametrize("name", NEURONS)
def test_neurons_are_their_rows_and_columns(name: str) -> None:
    layer, count, wanted = NEURONS[name]
    groups = {group.places[0]: group for group in of(name, "neurons")}
    assert len(groups) == 3
    reader = next(iter(wanted)).rpartition(".")[0]
    for index in range(3):
        group = groups[f"{layer.format(index)}.{reader}"]
        assert group.count == count
        assert facts(group) == placed(wanted, layer.format(index))
        assert Group.from_json(group.to_json()) == group


@pytest.mark.parametrize("name", HEADS)
def test_heads_are_their_rows_and_columns(name: str) -> None:
    layer, count, sharing, wanted = HEADS[name]
    groups = {group.places[0]: group for group in of(name, "heads")}
    assert len(groups) == 3
    reader = next(iter(wanted)).rpartition(".")[0]
    for index in range(3):
        group = groups[f"{layer.format(index)}.{reader}"]
        assert (group.count, group.of) == (count, sharing)
        assert facts(group) == placed(wanted, layer.format(index))
        assert Group.from_json(group.to_json()) == group


def test_a_table_of_relative_positions_couples_the_layers_that_read_it() -> None:
    """T5: one column of the first layer's table is a head's in every layer of the stack; cross-attention has none."""
    groups = of("t5", "heads")
    places = sorted(sorted(group.places) for group in groups)
    attention = "block.{}.layer.{}.{}.o"
    assert places == sorted(
        [
            *([f"decoder.{attention.format(i, 1, 'EncDecAttention')}"] for i in range(3)),
            [f"decoder.{attention.format(i, 0, 'SelfAttention')}" for i in range(3)],
            [f"encoder.{attention.format(i, 0, 'SelfAttention')}" for i in range(2)],
        ]
    )
    for group in groups:
        tables = [axis for axis in group.writers if "relative" in axis.parameter or "relative" in axis.path]
        assert len(tables) == (len(group.places) > 1)
        assert all((axis.axis, axis.units) == (1, (0, 1, 2, 3)) for axis in tables)


def test_grouped_heads_in_a_fused_projection() -> None:
    """q, k and v in one matrix: of its rows some are a head's and some a key-value group's."""
    model = reference_decoder(Shape(fused=True, attention="hand", bias=True, positions="learned"))
    groups, _ = coupled(model, "heads", (zoo.tokens(61),))
    assert facts(groups[0]) == {
        "layers.0.attention.o.weight": (1, [(0, 0, 4, 8)]),
        "layers.0.attention.qkv.weight": (0, [(0, 0, 4, 8)]),
        "layers.0.attention.qkv.bias": (0, [(0, 0, 4, 8)]),
        "shared layers.0.attention.qkv.weight": (0, [(32, 0, 2, 8), (48, 0, 2, 8)]),
        "shared layers.0.attention.qkv.bias": (0, [(32, 0, 2, 8), (48, 0, 2, 8)]),
    }


class Odd(nn.Module):
    """A block whose feed-forward network is `kind` of odd."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.scale = nn.Parameter(torch.ones(12))
        self.gain = nn.Parameter(torch.ones(1))
        self.norm, self.other = nn.LayerNorm(12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.up(x))
        if self.kind == "scaled":
            h = h * self.scale * self.gain
        if self.kind == "paired":  # a column reads every other row, turned round
            h = h.flip(-1)
        if self.kind == "mixed":
            h = h + h.roll(1, -1)
        if self.kind == "normed":
            h = self.norm(h)
        out: Tensor = x + self.down(h)
        return out + 0.1 * self.other(h) if self.kind == "read twice" else out


class OddModel(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.layers = nn.ModuleList(Odd(kind) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return x


def odd(kind: str) -> tuple[list[Group], dict[str, str]]:
    return coupled(OddModel(kind), "neurons", (zoo.tokens(20),))


def test_a_vector_on_the_way_is_cut_and_a_number_is_not() -> None:
    groups, refused = odd("scaled")
    assert not refused
    assert set(facts(groups[1])) == {f"layers.1.{name}" for name in ("down.weight", "up.weight", "up.bias", "scale")}


def test_a_row_is_matched_to_its_column_wherever_it_stands() -> None:
    (first, *_), _ = odd("paired")
    units = {axis.name: axis.units for axis in first.axes}
    assert units["layers.0.up.weight"] == tuple(reversed(range(12)))
    assert units["layers.0.down.weight"] == tuple(range(12))


@pytest.mark.parametrize("kind", ["mixed", "normed", "read twice"])
def test_neurons_that_do_not_come_apart_are_refused(kind: str) -> None:
    groups, refused = odd(kind)
    assert not groups
    assert {path.rpartition(".")[0] for path in refused} == {"layers.0", "layers.1"}
    assert all("several" in said or "as well" in said for said in refused.values())


def test_groups_that_share_an_axis_are_one_and_must_divide_it_alike() -> None:
    table = Axis.of("", "table", 1, (0, 1, 2))
    one, other = (Group("heads", 3, (Axis.of(path, "weight", 1, (0, 1, 2)),), (table,)) for path in "ab")
    (both,) = joined([one, other])
    assert both.places == ("a", "b")
    assert [axis.name for axis in both.writers] == ["table"]
    turned = Group("heads", 3, other.readers, (Axis.of("", "table", 1, (2, 1, 0)),))
    with pytest.raises(ValueError, match="table"):
        joined([one, turned])


@pytest.mark.parametrize("embedding", [24, 16])
def test_norms_of_another_stream_are_not_of_this_one(embedding: int) -> None:
    """ALBERT maps a stream of embeddings to the hidden one: the norm of the first stays whole, as wide as it may be."""
    sizes = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 14}
    model = AlbertForMaskedLM(AlbertConfig(vocab_size=61, embedding_size=embedding, **sizes)).eval()
    surgery.apply(surgery.parse("prune channels 25%"), model)
    assert model.albert.embeddings.LayerNorm.weight.shape == (embedding,)
    group = model.albert.encoder.albert_layer_groups[0].albert_layers[0]
    assert group.full_layer_layer_norm.weight.shape == (18,)
    assert surgery.verify(model)
