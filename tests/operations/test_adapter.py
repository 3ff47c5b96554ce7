"""Adapters: the formula against networks written out, alone and in a row; identity on every family and base."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import surgery
from surgery.graph.edge import Edge
from surgery.operations.adapter import ACTIVATIONS
from tests import zoo
from tests.operations.adapters import EVERYWHERE, ROW, apply, bottleneck, of, trained
from tests.reference_decoder import ReferenceDecoder, Shape, reference_decoder

HOULSBY = "adapter bottleneck 5 after attn, ffn"
PARALLEL = "adapter bottleneck 5 gelu beside ffn scale 4"


class Written(ReferenceDecoder):
    """A reference decoder whose layers are written out with a function at each edge: (y, x, layer, role) -> y."""

    edge: Any

    def layer(self, number: int, x: Tensor, *positions: Tensor) -> Tensor:
        layer: Any = self.layers[number]
        h = layer.attention_norm(x)
        x = x + self.edge(layer.attention(h, *positions), h, number, "attention.o")
        h = layer.ffn_norm(x)
        return x + self.edge(layer.ffn(h), h, number, "ffn.down")

    def forward(self, tokens: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        length = tokens.shape[1]
        x = self.embed(tokens)
        cos, sin = self.rotary(torch.arange(length)[None], x)
        visible = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        for number in range(len(self.layers)):
            x = self.layer(number, x, cos, sin, visible)
        return self.head(self.norm(x))


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
def test_three_papers_written_out(fused: bool) -> None:
    """Houlsby's after both, Pfeiffer's after the ffn, the parallel one beside it, on a decoder in float64."""
    shape = Shape(vocabulary=31, width=18, layers=2, heads=3, key_value_heads=1, ffn=25, bias=True, fused=fused)
    tokens = zoo.tokens(31)

    def houlsby(w: dict[str, Tensor], y: Tensor, x: Tensor, role: str) -> Tensor:
        return y + bottleneck(y, w)

    def pfeiffer(w: dict[str, Tensor], y: Tensor, x: Tensor, role: str) -> Tensor:
        return y + bottleneck(y, w, F.silu) if role == "ffn.down" else y

    def parallel(w: dict[str, Tensor], y: Tensor, x: Tensor, role: str) -> Tensor:
        return y + bottleneck(x, w, F.gelu, 4.0) if role == "ffn.down" else y

    for text, meaning in (
        (HOULSBY, houlsby),
        ("adapter bottleneck 5 swish after ffn", pfeiffer),
        (PARALLEL, parallel),
    ):
        model = reference_decoder(shape)
        written = reference_decoder(shape)
        written.__class__ = Written
        base = model(tokens)
        surgery.apply(surgery.parse(text), model, example_inputs=(tokens,))
        assert torch.equal(model(tokens), base)
        tensors = trained(model)
        written.edge = lambda y, x, layer, role, tensors=tensors, meaning=meaning: meaning(
            of(tensors, f"layers.{layer}.{role}"), y, x, role
        )
        assert torch.allclose(model(tokens), written(tokens), rtol=0, atol=1e-12)
        assert (model(tokens) - base).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("word", ACTIVATIONS)
def test_activations(word: str) -> None:
    """Every word means torch's function of that name, or the one that it is an alias of."""
    aliases = {"gelu_new": lambda x: F.gelu(x, approximate="tanh"), "swish": F.silu}
    plain = word in ("identity", "linear")
    function = (lambda x: x) if plain else aliases.get(word) or getattr(F, word)
    model = reference_decoder(Shape(layers=1))
    surgery.apply(surgery.parse(f"adapter {word} bottleneck 4 after ffn"), model, example_inputs=(zoo.tokens(61),))
    edge = model.layers[0].ffn.down.surgery_edge
    w = of(trained(model), "layers.0.ffn.down")
    y = torch.randn(3, 32, dtype=torch.float64, generator=zoo.seeded(0, "y"))
    assert torch.allclose(edge(y, None), y + bottleneck(y, w, function), rtol=0, atol=1e-12)
    assert plain or not torch.allclose(edge(y, None), y + bottleneck(y, w, lambda x: x))


@torch.no_grad()
def test_learned_scale_norm_and_dropout() -> None:
    model = reference_decoder(Shape(layers=1))
    text = "adapter bottleneck 40 beside ffn scale learned 3 dropout 50% norm"
    surgery.apply(surgery.parse(text), model, example_inputs=(zoo.tokens(61),))
    edge: Edge = model.layers[0].ffn.down.surgery_edge
    w = of(surgery.parameters(model), "layers.0.ffn.down")
    assert w["scale"].tolist() == [3.0]
    trained(model)
    y, x = torch.randn(2, 3, 32, dtype=torch.float64, generator=zoo.seeded(0, "y"))
    normed = F.layer_norm(x, (32,), w["norm_weight"], w["norm_bias"])
    expected = y + bottleneck(normed, w, F.relu, float(w["scale"]))
    assert torch.allclose(edge(y, x), expected, rtol=0, atol=1e-12)
    edge.train()
    torch.manual_seed(0)
    hidden = F.dropout(F.relu(normed @ w["down_weight"].t() + w["down_bias"]), 0.5)
    dropped = y + w["scale"] * (hidden @ w["up_weight"].t() + w["up_bias"])
    torch.manual_seed(0)
    assert torch.allclose(edge(y, x), dropped, rtol=0, atol=1e-12)
    assert not torch.allclose(dropped, expected)


@torch.no_grad()
def test_a_row_reads_what_comes_before() -> None:
    """`then` says the order, whatever the statements are called and however they are permuted."""
    lines = (
        "adapter bottleneck 2 after ffn then a as c",
        "adapter bottleneck 3 beside ffn then b as a",
        "adapter bottleneck 4 after ffn as b",
    )
    y, x = torch.randn(2, 3, 32, dtype=torch.float64, generator=zoo.seeded(0, "y"))
    found = []
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)):
        model = reference_decoder(Shape(layers=1))
        surgery.apply(surgery.parse("\n".join(lines[i] for i in order)), model, example_inputs=(zoo.tokens(61),))
        tensors = trained(model)
        found.append(model.layers[0].ffn.down.surgery_edge(y, x))
        path = "layers.0.ffn.down"
        first = y + bottleneck(y, of(tensors, path, "c_"))
        second = first + bottleneck(x, of(tensors, path, "a_"))
        assert torch.allclose(found[-1], second + bottleneck(second, of(tensors, path, "b_")), rtol=0, atol=1e-12)
        with surgery.disabled(model):
            assert torch.equal(model.layers[0].ffn.down.surgery_edge(y, x), y)
        surgery.activate(model, "c")
        assert torch.allclose(model.layers[0].ffn.down.surgery_edge(y, x), first, rtol=0, atol=1e-12)
        surgery.activate(model, "b")
        alone = y + bottleneck(y, of(tensors, path, "b_"))
        assert torch.allclose(model.layers[0].ffn.down.surgery_edge(y, x), alone, rtol=0, atol=1e-12)
    assert all(torch.equal(each, found[0]) for each in found)


@torch.no_grad()
@pytest.mark.parametrize(
    "base", ["", "quantize base nf4; ", "quantize base int8; ", "prune magnitude 50% on attn + ffn; "]
)
@pytest.mark.parametrize("family", EVERYWHERE)
def test_identity_at_the_start(family: str, base: str) -> None:
    """To the bit, in train and eval mode, over 4-bit, 8-bit and pruned bases; and off, once it is something else."""
    dtype = torch.float64 if family in zoo.PLAIN and not base else torch.float32
    plain = zoo.specimen(family, dtype=dtype)
    if base:
        apply(base, plain)
    specimen = zoo.specimen(family, dtype=dtype)
    apply(f"{base}{ROW}; adapter bottleneck 5 after attn", specimen)
    for mode in (False, True):
        plain.model.train(mode)
        specimen.model.train(mode)
        assert torch.equal(specimen.logits(), plain.logits())
    specimen.model.eval()
    plain.model.eval()
    trained(specimen.model)
    assert not torch.allclose(specimen.logits(), plain.logits(), atol=1e-2)
    with surgery.disabled(specimen.model):
        assert torch.equal(specimen.logits(), plain.logits())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_over_16_bits(dtype: torch.dtype) -> None:
    """The adapter computes in float32 and its sum is rounded once; the model's own tensors stay 16 bits wide."""
    specimen = zoo.specimen("gpt2", dtype=dtype)
    base = specimen.logits()
    apply("adapter bottleneck 5 after ffn", specimen)
    assert torch.equal(specimen.logits(), base)
    tensors = trained(specimen.model)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    edge = specimen.model.transformer.h[0].mlp.dropout.surgery_edge
    y = torch.randn(2, 7, 21, generator=zoo.seeded(0, "y")).to(dtype)
    expected = y + bottleneck(y.float(), of(tensors, "transformer.h.0.mlp.dropout"))
    assert torch.equal(edge(y, None), expected.to(dtype))
    assert specimen.logits().dtype == dtype
