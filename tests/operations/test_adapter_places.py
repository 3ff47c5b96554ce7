"""Adapters in other families: parallel residuals, experts, torch's own layers, one layer run again, cross-attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.graph.edge import CHILD
from tests import zoo
from tests.operations.adapters import ROW, apply, bottleneck, of, trained


@torch.no_grad()
@pytest.mark.parametrize("name", ["PhiForCausalLM", "FalconForCausalLM", "GPTJForCausalLM", "MixtralForCausalLM",
                                  "Qwen2MoeForCausalLM", "Llama4ForCausalLM", "Gemma2ForCausalLM"])  # fmt: skip
def test_parallel_residuals_and_experts(name: str) -> None:
    """Identity at the start, the ffn's input beside it whatever shape it is read in, and off."""
    import transformers

    from tests.anatomy.test_edges import OTHERS

    config, fields, _ = OTHERS[name]
    with torch.random.fork_rng(devices=[]):
        model = getattr(transformers, name)(getattr(transformers, config)(**fields)).eval()
    ids = zoo.tokens(61)
    base = model(input_ids=ids, use_cache=False).logits
    surgery.apply(surgery.parse(f"{ROW}; adapter bottleneck 5 after attn"), model)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, base)
    trained(model)
    assert not torch.allclose(model(input_ids=ids, use_cache=False).logits, base, atol=1e-3)
    with surgery.disabled(model):
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, base)
    assert surgery.verify(model)


class Encoder(nn.Module):
    """torch's own encoder, whose layers have a fast path that calls none of their modules."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(23, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 29, batch_first=True, norm_first=norm_first)
        self.stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.stack(self.embed(ids))
        return hidden


@torch.no_grad()
@pytest.mark.parametrize("norm_first", [False, True])
def test_torchs_own_layers(norm_first: bool) -> None:
    model, ids = Encoder(norm_first).eval(), torch.arange(14).view(2, 7)
    base = model(ids)
    text = "adapter bottleneck 3 beside ffn; adapter bottleneck 2 after attn"
    surgery.apply(surgery.parse(text), model, example_inputs=(ids,))
    # Without its fast path a layer of torch rounds otherwise.
    assert torch.allclose(model(ids), base, atol=1e-5)
    start = model(ids)
    trained(model)
    assert not torch.allclose(model(ids), start, atol=1e-2)
    with surgery.disabled(model):
        assert torch.equal(model(ids), start)
    assert surgery.verify(model, example_inputs=(ids,))


@torch.no_grad()
def test_one_layer_in_several_places() -> None:
    """ALBERT runs one layer again and again: each run reads the input of that run."""
    import transformers

    fields = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = transformers.AlbertForMaskedLM(transformers.AlbertConfig(**fields, vocab_size=61, embedding_size=16)).eval()
    zoo.fill(model, 0)
    ids = zoo.tokens(61)
    base = model(input_ids=ids).logits
    surgery.apply(surgery.parse("adapter bottleneck 3 beside ffn"), model)
    assert torch.equal(model(input_ids=ids).logits, base)
    layer = model.albert.encoder.albert_layer_groups[0].albert_layers[0]
    (w,) = [of(trained(model), path) for path in ("albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output",)]
    found = model(input_ids=ids).logits
    with surgery.disabled(model):
        given: list[Tensor] = []
        layer.ffn.register_forward_pre_hook(lambda module, args: given.append(args[0]))
        layer.ffn_output.register_forward_hook(lambda module, args, y: y + bottleneck(given[-1], w))
        assert torch.allclose(model(input_ids=ids).logits, found, atol=1e-5)
    assert len(given) == 3


@torch.no_grad()
def test_cross_attention_and_one_stack() -> None:
    specimen = zoo.specimen("t5")
    base = specimen.logits()
    apply("adapter bottleneck 3 beside cross; adapter bottleneck 2 after attn, ffn in encoder", specimen)
    assert torch.equal(specimen.logits(), base)
    places = {name.partition(f".{CHILD}")[0] for name in trained(specimen.model)}
    encoder = {f"encoder.block.{layer}.layer.{number}.dropout" for layer in range(2) for number in range(2)}
    assert places == encoder | {f"decoder.block.{layer}.layer.1.dropout" for layer in range(3)}
    assert not torch.allclose(specimen.logits(), base, atol=1e-2)
    assert surgery.verify(specimen.model)
