"""Edges, family by family, in a table written by hand: what a sub-layer adds to the residual stream, and what it reads.

The tables say where; `test_zeroed_edges_leave_the_stream` proves without them that there is nothing before or behind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surgery.anatomy import study
from surgery.anatomy.parts import Part
from tests import zoo

# role, module whose output is the edge, module that takes the sub-layer's input; in one layer, `*` for its number.
Row = tuple[str, str, str | None]
FACTS: dict[str, list[Row]] = {
    "llama": [
        ("attn", "model.layers.*.self_attn.o_proj", "model.layers.*.self_attn.q_proj"),
        ("ffn", "model.layers.*.mlp.down_proj", "model.layers.*.mlp.gate_proj"),
    ],
    "qwen2": [
        ("attn", "model.layers.*.self_attn.o_proj", "model.layers.*.self_attn.q_proj"),
        ("ffn", "model.layers.*.mlp.down_proj", "model.layers.*.mlp.gate_proj"),
    ],
    "gemma": [
        ("attn", "model.layers.*.self_attn.o_proj", "model.layers.*.self_attn.q_proj"),
        ("ffn", "model.layers.*.mlp.down_proj", "model.layers.*.mlp.gate_proj"),
    ],
    # The dropouts of the layer come last, and are modules.
    "phi3": [
        ("attn", "model.layers.*.resid_attn_dropout", "model.layers.*.self_attn.qkv_proj"),
        ("ffn", "model.layers.*.resid_mlp_dropout", "model.layers.*.mlp.gate_up_proj"),
    ],
    "gpt2": [
        ("attn", "transformer.h.*.attn.resid_dropout", "transformer.h.*.attn.c_attn"),
        ("ffn", "transformer.h.*.mlp.dropout", "transformer.h.*.mlp.c_fc"),
    ],
    # Parallel: the two are added to each other before they are added to the stream.
    "gpt_neox": [
        ("attn", "gpt_neox.layers.*.post_attention_dropout", "gpt_neox.layers.*.attention.query_key_value"),
        ("ffn", "gpt_neox.layers.*.post_mlp_dropout", "gpt_neox.layers.*.mlp.dense_h_to_4h"),
    ],
    # The feed-forward is written into the layer; its dropout is a function, and the projection stands before that.
    "opt": [
        ("attn", "model.decoder.layers.*.self_attn.out_proj", "model.decoder.layers.*.self_attn.q_proj"),
        ("ffn", "model.decoder.layers.*.fc2", "model.decoder.layers.*.fc1"),
    ],
    "bert": [
        ("attn", "bert.encoder.layer.*.attention.output.dropout", "bert.encoder.layer.*.attention.self.query"),
        ("ffn", "bert.encoder.layer.*.output.dropout", "bert.encoder.layer.*.intermediate.dense"),
    ],
    "t5": [
        ("attn", "encoder.block.*.layer.0.dropout", "encoder.block.*.layer.0.SelfAttention.q"),
        ("ffn", "encoder.block.*.layer.1.dropout", "encoder.block.*.layer.1.DenseReluDense.wi"),
        ("attn", "decoder.block.*.layer.0.dropout", "decoder.block.*.layer.0.SelfAttention.q"),
        ("cross", "decoder.block.*.layer.1.dropout", "decoder.block.*.layer.1.EncDecAttention.q"),
        ("ffn", "decoder.block.*.layer.2.dropout", "decoder.block.*.layer.2.DenseReluDense.wi"),
    ],
    "nano": [("attn", "blocks.*.out", "blocks.*.qkv"), ("ffn", "blocks.*.narrow", "blocks.*.wide")],
    "byhand": [("attn", "blocks.*.wo", "blocks.*.wq"), ("ffn", "blocks.*.drop", "blocks.*.lift")],
}
SMALL = {
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 61,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
EXPERTS = {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
Made = tuple[str, dict[str, Any], list[Row]]
OTHERS: dict[str, Made] = {
    # Norms between the sub-layer and the addition belong to the sub-layer.
    "Gemma2ForCausalLM": (
        "Gemma2Config",
        {**GROUPED, "head_dim": 6},
        [
            ("attn", "model.layers.*.post_attention_layernorm", "model.layers.*.self_attn.q_proj"),
            ("ffn", "model.layers.*.post_feedforward_layernorm", "model.layers.*.mlp.gate_proj"),
        ],
    ),
    "Glm4ForCausalLM": (
        "Glm4Config",
        {**GROUPED, "head_dim": 6, "pad_token_id": 0, "eos_token_id": 1},
        [
            ("attn", "model.layers.*.post_self_attn_layernorm", "model.layers.*.self_attn.q_proj"),
            ("ffn", "model.layers.*.post_mlp_layernorm", "model.layers.*.mlp.gate_up_proj"),
        ],
    ),
    # One dropout for both, which cannot be told apart: the projections before it can.
    "PhiForCausalLM": (
        "PhiConfig",
        {**SMALL, "hidden_size": 32},
        [
            ("attn", "model.layers.*.self_attn.dense", "model.layers.*.self_attn.q_proj"),
            ("ffn", "model.layers.*.mlp.fc2", "model.layers.*.mlp.fc1"),
        ],
    ),
    "FalconForCausalLM": (
        "FalconConfig",
        {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61},
        [
            ("attn", "transformer.h.*.self_attention.dense", "transformer.h.*.self_attention.query_key_value"),
            ("ffn", "transformer.h.*.mlp.dense_4h_to_h", "transformer.h.*.mlp.dense_h_to_4h"),
        ],
    ),
    "GPTJForCausalLM": (
        "GPTJConfig",
        {"n_embd": 24, "n_layer": 2, "n_head": 4, "vocab_size": 61, "rotary_dim": 4, "n_positions": 64},
        [
            ("attn", "transformer.h.*.attn.resid_dropout", "transformer.h.*.attn.q_proj"),
            ("ffn", "transformer.h.*.mlp.dropout", "transformer.h.*.mlp.fc_in"),
        ],
    ),
    # The residual is scaled where it is added.
    "GraniteForCausalLM": (
        "GraniteConfig",
        {**GROUPED, "residual_multiplier": 0.3},
        [
            ("attn", "model.layers.*.self_attn.o_proj", "model.layers.*.self_attn.q_proj"),
            ("ffn", "model.layers.*.mlp.down_proj", "model.layers.*.mlp.gate_proj"),
        ],
    ),
    # Of a mixture of experts, the edge is what all of them give together.
    "MixtralForCausalLM": (
        "MixtralConfig",
        {**GROUPED, "num_local_experts": 4},
        [
            ("attn", "model.layers.*.self_attn.o_proj", "model.layers.*.self_attn.q_proj"),
            ("ffn", "model.layers.*.mlp", "model.layers.*.mlp.gate"),
        ],
    ),
    "Qwen2MoeForCausalLM": (
        "Qwen2MoeConfig",
        {**EXPERTS, "shared_expert_intermediate_size": 28},
        [
            ("attn", "model.layers.*.self_attn.o_proj", "model.layers.*.self_attn.q_proj"),
            ("ffn", "model.layers.*.mlp", "model.layers.*.mlp.shared_expert.gate_proj"),
        ],
    ),
    # Routed inputs are repeated and weighed by then: they are not what the block reads.
    "Llama4ForCausalLM": (
        "Llama4TextConfig",
        {**GROUPED, "head_dim": 6, "intermediate_size_mlp": 30, "num_local_experts": 4},
        [
            ("attn", "model.layers.*.self_attn.o_proj", "model.layers.*.self_attn.q_proj"),
            ("ffn", "model.layers.*.feed_forward", "model.layers.*.feed_forward.shared_expert.gate_proj"),
        ],
    ),
    "MambaForCausalLM": (
        "MambaConfig",
        {"hidden_size": 24, "num_hidden_layers": 2, "vocab_size": 61, "state_size": 4},
        [("mixer", "backbone.layers.*.mixer.out_proj", "backbone.layers.*.mixer.in_proj")],
    ),
}


def rows(parts: tuple[Part, ...], layer: int) -> list[Row]:
    def starred(path: str | None) -> str | None:
        return None if path is None else path.replace(f".{layer}.", ".*.", 1)

    edges = [part for part in parts if part.kind == "edge" and part.layer == layer]
    assert not any(part.inlined for part in edges)
    return [(part.role, str(starred(part.path)), starred(part.input)) for part in edges]


@pytest.mark.parametrize("on_meta", [False, True], ids=["live", "meta"])
@pytest.mark.parametrize("family", FACTS)
def test_edges_of_the_zoo(family: str, on_meta: bool) -> None:
    specimen = zoo.specimen(family)
    model = specimen.model.to("meta") if on_meta else specimen.model
    anatomy = study(model, specimen.example)
    for layer in range(2):
        assert rows(anatomy.parts, layer) == FACTS[family]
    width = {part.shape for part in anatomy.parts if part.kind == "edge"}
    assert width == {(next(part.shape[1] for part in anatomy.parts if part.role == "embed"),)}


@pytest.mark.parametrize("name", OTHERS)
def test_edges_of_other_families(name: str) -> None:
    import transformers

    config, fields, expected = OTHERS[name]
    with torch.device("meta"):
        model = getattr(transformers, name)(getattr(transformers, config)(**fields))
    assert rows(study(model).parts, 1) == expected


@torch.no_grad()
@pytest.mark.parametrize("family", [name for name in FACTS if name != "bert"])
def test_zeroed_edges_leave_the_stream(family: str) -> None:
    """With nothing on its edges, a layer gives the bits that it gets; a norm behind it (BERT) apart."""
    specimen = zoo.specimen(family)
    anatomy = study(specimen.model, specimen.example)
    layers = [part.path for part in anatomy.parts if part.role == "layer"]
    moved: list[bool] = []

    def passes_on(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        moved.append(not torch.equal(output[0] if isinstance(output, tuple) else output, given))

    for path in layers:
        specimen.model.get_submodule(path).register_forward_hook(passes_on, with_kwargs=True)
    specimen.logits()
    assert all(moved)
    for part in anatomy.parts:
        if part.kind == "edge":
            specimen.model.get_submodule(part.path).register_forward_hook(lambda module, args, output: output * 0)
    moved.clear()
    specimen.logits()
    assert len(moved) == len(layers)
    assert not any(moved)


@torch.no_grad()
@pytest.mark.parametrize("family", FACTS)
def test_inputs_are_taken_before_edges_are_given(family: str) -> None:
    """The module that takes the input runs once before the one that gives the edge, with the stream's features."""
    specimen = zoo.specimen(family)
    seen: list[tuple[str, str, int]] = []

    def note(kind: str, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], *output: Tensor) -> None:
            seen.append((kind, path, (output or args)[0].shape[-1]))

        return hook

    edges = [part for part in study(specimen.model, specimen.example).parts if part.kind == "edge"]
    for part in edges:
        assert part.input is not None
        specimen.model.get_submodule(part.input).register_forward_pre_hook(note("taken", part.path))
        specimen.model.get_submodule(part.path).register_forward_hook(note("given", part.path))
    specimen.logits()
    assert seen == [(kind, part.path, part.shape[0]) for part in edges for kind in ("taken", "given")]


class Block(nn.Module):
    """A residual block whose feed-forward `inner` computes; the stream is what `forward` adds to."""

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 17), nn.Linear(17, width)
        self.gamma = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x))

    def inner(self, h: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(h)))


class Scaled(Block):
    """A learned scale written into the block: the projection stands before it."""

    def inner(self, h: Tensor) -> Tensor:
        return self.gamma * super().inner(h)


class Normed(Block):
    """A norm behind the feed-forward, its parameters in a module."""

    def __init__(self, width: int = 10) -> None:
        super().__init__(width)
        self.behind = nn.LayerNorm(width)

    def inner(self, h: Tensor) -> Tensor:
        return F.dropout(self.behind(super().inner(h)), 0.1, self.training)


class Bare(Block):
    """No module takes the product: the matrices are the block's own."""

    def __init__(self, width: int = 10) -> None:
        super().__init__(width)
        self.up = self.down = None  # type: ignore[assignment]
        self.wide, self.narrow = nn.Parameter(torch.randn(17, width)), nn.Parameter(torch.randn(width, 17))

    def inner(self, h: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(h, self.wide)), self.narrow)


class Twice(Block):
    """The same feed-forward twice in one layer: neither of the two edges has a module to itself."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return super().forward(x)


class Stack(nn.Module):
    def __init__(self, block: type[Block]) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 10)
        self.blocks = nn.ModuleList(block() for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(
    ("block", "path", "taken", "inlined"),
    [
        (Block, "blocks.1.down", "blocks.1.up", False),
        (Scaled, "blocks.1.down", "blocks.1.up", False),
        (Normed, "blocks.1.behind", "blocks.1.up", False),
        (Bare, "blocks.1", None, True),
        (Twice, "blocks.1.down", None, True),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_blocks_written_out(block: type[Block], path: str, taken: str | None, inlined: bool) -> None:
    parts = study(Stack(block), (torch.arange(6).view(2, 3),)).parts
    (edge,) = [part for part in parts if part.kind == "edge" and part.layer == 1]
    assert (edge.role, edge.path, edge.input, edge.inlined) == ("ffn", path, taken, inlined)
