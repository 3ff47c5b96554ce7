"""Roles of known models against a table written by hand (promise: roles by dataflow, no table of architectures)."""

from __future__ import annotations

from typing import Any

import pytest

from surgery.anatomy import Anatomy, Part, study
from tests import zoo

Fact = tuple[Any, ...]

# (role, module of layer * or outside, shape, then any of: channels, "T" for stored transposed, "b" for a bias).
FACTS: dict[str, dict[str, list[Fact]]] = {
    "llama": {
        "stacks": [("decoder", "model.layers", 3)],
        "outside": [
            ("embed", "model.embed_tokens", (61, 24)),
            ("norm", "model.norm", (24,)),
            ("head", "lm_head", (61, 24)),
        ],
        "decoder": [
            ("norm", "model.layers.*.input_layernorm", (24,)),
            ("attn.q", "model.layers.*.self_attn.q_proj", (24, 24)),
            ("attn.k", "model.layers.*.self_attn.k_proj", (12, 24)),
            ("attn.v", "model.layers.*.self_attn.v_proj", (12, 24)),
            ("attn", "model.layers.*.self_attn", (4, 2, 6, 6)),
            ("attn.o", "model.layers.*.self_attn.o_proj", (24, 24)),
            ("norm", "model.layers.*.post_attention_layernorm", (24,)),
            ("ffn.gate", "model.layers.*.mlp.gate_proj", (37, 24)),
            ("ffn.up", "model.layers.*.mlp.up_proj", (37, 24)),
            ("ffn.down", "model.layers.*.mlp.down_proj", (24, 37)),
        ],
    },
    "qwen2": {
        "stacks": [("decoder", "model.layers", 3)],
        "outside": [
            ("embed", "model.embed_tokens", (59, 20), "tied"),
            ("norm", "model.norm", (20,)),
            ("head", "lm_head", (59, 20), "tied"),
        ],
        "decoder": [
            ("norm", "model.layers.*.input_layernorm", (20,)),
            ("attn.q", "model.layers.*.self_attn.q_proj", (20, 20), "b"),
            ("attn.k", "model.layers.*.self_attn.k_proj", (4, 20), "b"),
            ("attn.v", "model.layers.*.self_attn.v_proj", (4, 20), "b"),
            ("attn", "model.layers.*.self_attn", (5, 1, 4, 4)),
            ("attn.o", "model.layers.*.self_attn.o_proj", (20, 20)),
            ("norm", "model.layers.*.post_attention_layernorm", (20,)),
            ("ffn.gate", "model.layers.*.mlp.gate_proj", (35, 20)),
            ("ffn.up", "model.layers.*.mlp.up_proj", (35, 20)),
            ("ffn.down", "model.layers.*.mlp.down_proj", (20, 35)),
        ],
    },
    "gemma": {
        "stacks": [("decoder", "model.layers", 3)],
        "outside": [
            ("embed", "model.embed_tokens", (67, 18), "tied"),
            ("norm", "model.norm", (18,)),
            ("head", "lm_head", (67, 18), "tied"),
        ],
        "decoder": [
            ("norm", "model.layers.*.input_layernorm", (18,)),
            ("attn.q", "model.layers.*.self_attn.q_proj", (30, 18)),
            ("attn.k", "model.layers.*.self_attn.k_proj", (10, 18)),
            ("attn.v", "model.layers.*.self_attn.v_proj", (10, 18)),
            ("attn", "model.layers.*.self_attn", (3, 1, 10, 10)),
            ("attn.o", "model.layers.*.self_attn.o_proj", (18, 30)),
            ("norm", "model.layers.*.post_attention_layernorm", (18,)),
            ("ffn.gate", "model.layers.*.mlp.gate_proj", (41, 18)),
            ("ffn.up", "model.layers.*.mlp.up_proj", (41, 18)),
            ("ffn.down", "model.layers.*.mlp.down_proj", (18, 41)),
        ],
    },
    "phi3": {
        "stacks": [("decoder", "model.layers", 3)],
        "outside": [
            ("embed", "model.embed_tokens", (53, 30)),
            ("norm", "model.norm", (30,)),
            ("head", "lm_head", (53, 30)),
        ],
        "decoder": [
            ("norm", "model.layers.*.input_layernorm", (30,)),
            ("attn.q", "model.layers.*.self_attn.qkv_proj", (42, 30), ((0, 30),)),
            ("attn.k", "model.layers.*.self_attn.qkv_proj", (42, 30), ((30, 36),)),
            ("attn.v", "model.layers.*.self_attn.qkv_proj", (42, 30), ((36, 42),)),
            ("attn", "model.layers.*.self_attn", (5, 1, 6, 6)),
            ("attn.o", "model.layers.*.self_attn.o_proj", (30, 30)),
            ("norm", "model.layers.*.post_attention_layernorm", (30,)),
            ("ffn.gate", "model.layers.*.mlp.gate_up_proj", (86, 30), ((0, 43),)),
            ("ffn.up", "model.layers.*.mlp.gate_up_proj", (86, 30), ((43, 86),)),
            ("ffn.down", "model.layers.*.mlp.down_proj", (30, 43)),
        ],
    },
    "gpt2": {
        "stacks": [("decoder", "transformer.h", 3)],
        "outside": [
            ("embed", "transformer.wte", (57, 21), "tied"),
            ("position", "transformer.wpe", (64, 21)),
            ("norm", "transformer.ln_f", (21,), "b"),
            ("head", "lm_head", (57, 21), "tied"),
        ],
        "decoder": [
            ("norm", "transformer.h.*.ln_1", (21,), "b"),
            ("attn.q", "transformer.h.*.attn.c_attn", (63, 21), "T", "b", ((0, 21),)),
            ("attn.k", "transformer.h.*.attn.c_attn", (63, 21), "T", "b", ((21, 42),)),
            ("attn.v", "transformer.h.*.attn.c_attn", (63, 21), "T", "b", ((42, 63),)),
            ("attn", "transformer.h.*.attn", (3, 3, 7, 7)),
            ("attn.o", "transformer.h.*.attn.c_proj", (21, 21), "T", "b"),
            ("norm", "transformer.h.*.ln_2", (21,), "b"),
            ("ffn.up", "transformer.h.*.mlp.c_fc", (38, 21), "T", "b"),
            ("ffn.down", "transformer.h.*.mlp.c_proj", (21, 38), "T", "b"),
        ],
    },
    "gpt_neox": {
        "stacks": [("decoder", "gpt_neox.layers", 3)],
        "outside": [
            ("embed", "gpt_neox.embed_in", (55, 24)),
            ("norm", "gpt_neox.final_layer_norm", (24,), "b"),
            ("head", "lm_head", (55, 24)),
        ],
        "decoder": [
            ("norm", "gpt_neox.layers.*.input_layernorm", (24,), "b"),
            # Heads of 8: query, key and value of each head side by side, 24 channels a head.
            ("attn.q", "gpt_neox.layers.*.attention.query_key_value", (72, 24), "b", ((0, 8), (24, 32), (48, 56))),
            ("attn.k", "gpt_neox.layers.*.attention.query_key_value", (72, 24), "b", ((8, 16), (32, 40), (56, 64))),
            ("attn.v", "gpt_neox.layers.*.attention.query_key_value", (72, 24), "b", ((16, 24), (40, 48), (64, 72))),
            ("attn", "gpt_neox.layers.*.attention", (3, 3, 8, 8)),
            ("attn.o", "gpt_neox.layers.*.attention.dense", (24, 24), "b"),
            ("norm", "gpt_neox.layers.*.post_attention_layernorm", (24,), "b"),
            ("ffn.up", "gpt_neox.layers.*.mlp.dense_h_to_4h", (39, 24), "b"),
            ("ffn.down", "gpt_neox.layers.*.mlp.dense_4h_to_h", (24, 39), "b"),
        ],
    },
    "opt": {
        "stacks": [("decoder", "model.decoder.layers", 3)],
        "outside": [
            ("embed", "model.decoder.embed_tokens", (63, 22), "tied"),
            ("position", "model.decoder.embed_positions", (66, 22)),
            ("norm", "model.decoder.final_layer_norm", (22,), "b"),
            ("head", "lm_head", (63, 22), "tied"),
        ],
        "decoder": [
            ("norm", "model.decoder.layers.*.self_attn_layer_norm", (22,), "b"),
            ("attn.q", "model.decoder.layers.*.self_attn.q_proj", (22, 22), "b"),
            ("attn.k", "model.decoder.layers.*.self_attn.k_proj", (22, 22), "b"),
            ("attn.v", "model.decoder.layers.*.self_attn.v_proj", (22, 22), "b"),
            ("attn", "model.decoder.layers.*.self_attn", (2, 2, 11, 11)),
            ("attn.o", "model.decoder.layers.*.self_attn.out_proj", (22, 22), "b"),
            ("norm", "model.decoder.layers.*.final_layer_norm", (22,), "b"),
            ("ffn.up", "model.decoder.layers.*.fc1", (45, 22), "b"),
            ("ffn.down", "model.decoder.layers.*.fc2", (22, 45), "b"),
        ],
    },
    "bert": {
        "stacks": [("encoder", "bert.encoder.layer", 3)],
        "outside": [
            ("embed", "bert.embeddings.word_embeddings", (58, 21), "tied"),
            ("lookup", "bert.embeddings.token_type_embeddings", (2, 21)),
            ("position", "bert.embeddings.position_embeddings", (64, 21)),
            ("norm", "bert.embeddings.LayerNorm", (21,), "b"),
            ("linear", "cls.predictions.transform.dense", (21, 21), "b"),
            ("norm", "cls.predictions.transform.LayerNorm", (21,), "b"),
            ("head", "cls.predictions.decoder", (58, 21), "b", "tied"),
        ],
        "encoder": [
            ("attn.q", "bert.encoder.layer.*.attention.self.query", (21, 21), "b"),
            ("attn.k", "bert.encoder.layer.*.attention.self.key", (21, 21), "b"),
            ("attn.v", "bert.encoder.layer.*.attention.self.value", (21, 21), "b"),
            ("attn", "bert.encoder.layer.*.attention.self", (3, 3, 7, 7)),
            ("attn.o", "bert.encoder.layer.*.attention.output.dense", (21, 21), "b"),
            ("norm", "bert.encoder.layer.*.attention.output.LayerNorm", (21,), "b"),
            ("ffn.up", "bert.encoder.layer.*.intermediate.dense", (34, 21), "b"),
            ("ffn.down", "bert.encoder.layer.*.output.dense", (21, 34), "b"),
            ("norm", "bert.encoder.layer.*.output.LayerNorm", (21,), "b"),
        ],
    },
    "t5": {
        "stacks": [("encoder", "encoder.block", 2), ("decoder", "decoder.block", 3)],
        "outside": [
            ("embed", "encoder.embed_tokens", (62, 19), "tied"),
            ("norm", "encoder.final_layer_norm", (19,)),
            ("embed", "decoder.embed_tokens", (62, 19), "tied"),
            ("norm", "decoder.final_layer_norm", (19,)),
            ("head", "lm_head", (62, 19), "tied"),
        ],
        "encoder": [
            ("norm", "encoder.block.*.layer.0.layer_norm", (19,)),
            ("attn.q", "encoder.block.*.layer.0.SelfAttention.q", (20, 19)),
            ("attn.k", "encoder.block.*.layer.0.SelfAttention.k", (20, 19)),
            ("attn.v", "encoder.block.*.layer.0.SelfAttention.v", (20, 19)),
            ("attn", "encoder.block.*.layer.0.SelfAttention", (4, 4, 5, 5)),
            ("attn.o", "encoder.block.*.layer.0.SelfAttention.o", (19, 20)),
            ("norm", "encoder.block.*.layer.1.layer_norm", (19,)),
            ("ffn.up", "encoder.block.*.layer.1.DenseReluDense.wi", (36, 19)),
            ("ffn.down", "encoder.block.*.layer.1.DenseReluDense.wo", (19, 36)),
        ],
        "decoder": [
            ("norm", "decoder.block.*.layer.0.layer_norm", (19,)),
            ("attn.q", "decoder.block.*.layer.0.SelfAttention.q", (20, 19)),
            ("attn.k", "decoder.block.*.layer.0.SelfAttention.k", (20, 19)),
            ("attn.v", "decoder.block.*.layer.0.SelfAttention.v", (20, 19)),
            ("attn", "decoder.block.*.layer.0.SelfAttention", (4, 4, 5, 5)),
            ("attn.o", "decoder.block.*.layer.0.SelfAttention.o", (19, 20)),
            ("norm", "decoder.block.*.layer.1.layer_norm", (19,)),
            ("cross.q", "decoder.block.*.layer.1.EncDecAttention.q", (20, 19)),
            ("cross.k", "decoder.block.*.layer.1.EncDecAttention.k", (20, 19)),
            ("cross.v", "decoder.block.*.layer.1.EncDecAttention.v", (20, 19)),
            ("cross", "decoder.block.*.layer.1.EncDecAttention", (4, 4, 5, 5)),
            ("cross.o", "decoder.block.*.layer.1.EncDecAttention.o", (19, 20)),
            ("norm", "decoder.block.*.layer.2.layer_norm", (19,)),
            ("ffn.up", "decoder.block.*.layer.2.DenseReluDense.wi", (36, 19)),
            ("ffn.down", "decoder.block.*.layer.2.DenseReluDense.wo", (19, 36)),
        ],
    },
    "nano": {
        "stacks": [("decoder", "blocks", 3)],
        "outside": [
            ("embed", "token", (51, 21)),
            ("position", "place", (48, 21)),
            ("norm", "last", (21,), "b"),
            ("head", "lm", (51, 21)),
        ],
        "decoder": [
            ("norm", "blocks.*.before", (21,), "b"),
            ("attn.q", "blocks.*.qkv", (63, 21), "b", ((0, 21),)),
            ("attn.k", "blocks.*.qkv", (63, 21), "b", ((21, 42),)),
            ("attn.v", "blocks.*.qkv", (63, 21), "b", ((42, 63),)),
            ("attn", "blocks.*", (3, 3, 7, 7)),
            ("attn.o", "blocks.*.out", (21, 21)),
            ("norm", "blocks.*.after", (21,), "b"),
            ("ffn.up", "blocks.*.wide", (44, 21), "b"),
            ("ffn.down", "blocks.*.narrow", (21, 44), "b"),
        ],
    },
    "byhand": {
        "stacks": [("decoder", "blocks", 3)],
        "outside": [
            ("embed", "token", (51, 21)),
            ("position", "place", (48, 21)),
            ("norm", "last", (21,), "b"),
            ("head", "lm", (51, 21)),
        ],
        "decoder": [
            ("norm", "blocks.*.before", (21,), "b"),
            ("attn.q", "blocks.*.wq", (21, 21), "b"),
            ("attn.k", "blocks.*.wk", (21, 21)),
            ("attn.v", "blocks.*.wv", (21, 21), "b"),
            ("attn", "blocks.*", (3, 3, 7, 7)),
            ("attn.o", "blocks.*.wo", (21, 21), "b"),
            ("norm", "blocks.*.after", (21,), "b"),
            ("ffn.up", "blocks.*.lift", (44, 21), "b"),
            ("ffn.down", "blocks.*.drop", (21, 44), "b"),
        ],
    },
}


def fact(part: Part, path: str) -> Fact:
    """A part as the table writes it."""
    if part.heads is not None:
        heads = part.heads
        return part.role, path, (heads.query, heads.key_value, heads.key_width, heads.value_width)
    marks: list[Any] = ["T"] * part.transposed + ["b"] * bool(part.bias) + ["tied"] * bool(part.tied)
    return (part.role, path, part.shape, *marks, *([part.channels] if part.channels is not None else []))


def facts(anatomy: Anatomy, stack: str | None, layer: int | None, prefix: str = "") -> list[Fact]:
    """Facts of one layer, or of what stands outside; T5's bias table, in its first layers only, is looked at apart."""
    found = []
    for part in anatomy.parts:
        if part.kind in ("block", "edge") or (part.stack, part.layer) != (stack, layer):
            continue
        if stack is not None and part.role == "position":
            continue
        path = part.path
        if stack is not None:
            assert path.startswith(f"{prefix}.{layer}"), path
            path = f"{prefix}.*{path[len(f'{prefix}.{layer}') :]}"
        found.append(fact(part, path))
    return found


@pytest.mark.parametrize("on_meta", [False, True], ids=["live", "meta"])
@pytest.mark.parametrize("family", FACTS)
def test_facts(family: str, on_meta: bool) -> None:
    specimen = zoo.specimen(family)
    model = specimen.model.to("meta") if on_meta else specimen.model
    if on_meta and hasattr(model, "tie_weights"):
        model.tie_weights()
    anatomy = study(model, specimen.example)
    expected = FACTS[family]
    assert [(s.name, s.path, s.depth) for s in anatomy.stacks] == expected["stacks"]
    assert facts(anatomy, None, None) == expected["outside"]
    for stack in anatomy.stacks:
        for layer in range(stack.depth):
            assert facts(anatomy, stack.name, layer, stack.path) == expected[stack.name]


def test_relative_positions() -> None:
    """T5 keeps its table of relative positions in the first layer of each stack."""
    anatomy = study(zoo.tiny("t5").to("meta"))
    tables = [(p.path, p.shape, p.stack, p.layer) for p in anatomy.parts if p.role == "position"]
    assert tables == [
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias", (32, 4), "encoder", 0),
        ("decoder.block.0.layer.0.SelfAttention.relative_attention_bias", (32, 4), "decoder", 0),
    ]


def test_ties_name_each_other() -> None:
    parts = {part.role: part for part in study(zoo.tiny("gpt2")).parts}
    assert parts["embed"].tied == ("lm_head",)
    assert parts["head"].tied == ("transformer.wte",)


@pytest.mark.parametrize(
    ("family", "blocks"),
    [
        ("llama", {"layer": "model.layers.1", "attn": "model.layers.1.self_attn", "ffn": "model.layers.1.mlp"}),
        ("bert", {"layer": "bert.encoder.layer.1", "attn": "bert.encoder.layer.1.attention"}),
        ("nano", {"layer": "blocks.1"}),
    ],
)
def test_blocks(family: str, blocks: dict[str, str]) -> None:
    """A block part stands where a module of its own holds the whole of the layer, its attention, its feed-forward."""
    specimen = zoo.specimen(family)
    parts = study(specimen.model, specimen.example).parts
    assert {p.role: p.path for p in parts if p.kind == "block" and p.layer == 1} == blocks


def test_demo() -> None:
    """The pretrained MiniLM encoder, all six layers."""
    models = pytest.importorskip("surgery.checkpoint.models")
    anatomy = study(models.load_meta("demo").model)
    assert [(s.name, s.path, s.depth) for s in anatomy.stacks] == [("encoder", "encoder.layer", 6)]
    for role, shape in {
        "attn.q": (384, 384), "attn.k": (384, 384), "attn.v": (384, 384), "attn.o": (384, 384),
        "ffn.up": (1536, 384), "ffn.down": (384, 1536),
    }.items():  # fmt: skip
        assert [(p.layer, p.shape) for p in anatomy.parts if p.role == role] == [(n, shape) for n in range(6)], role
    assert not [p for p in anatomy.parts if p.role == "head"]
