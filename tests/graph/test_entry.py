"""Positions: shifted where a model reads them, by the longest prefix that is on, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.graph.entry import Shift, points
from tests import zoo

WHERE = {
    "llama": [("model.rotary_emb", "argument")],
    "phi3": [("model.rotary_emb", "argument")],
    "gpt_neox": [("gpt_neox.rotary_emb", "argument")],
    "gpt2": [("transformer.wpe", "lookup")],
    "bert": [("bert.embeddings.position_embeddings", "lookup")],
    "opt": [("model.decoder.embed_positions", "argument")],
    "t5": [],
    "nano": [("place", "lookup")],
}


@pytest.mark.parametrize("name", WHERE)
def test_points_are_found(name: str) -> None:
    """Facts by hand: rotations and tables; T5's table of distances is none of them."""
    specimen = zoo.specimen(name)
    anatomy = surgery.study(specimen.model, specimen.example)
    assert [(point.path, point.kind) for point in points(specimen.model, anatomy.parts)] == WHERE[name]


def test_a_model_whose_positions_cannot_be_shifted_says_so() -> None:
    assert "positions are not shifted" in str(surgery.plan(surgery.parse("prefix 4"), zoo.tiny("t5")))
    assert "positions are not shifted" not in str(surgery.plan(surgery.parse("prefix 4"), zoo.tiny("llama")))


class Recorder(nn.Module):
    """A model that takes positions at its entry only, and counts them itself when they are not given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = zoo.plain("nano", dtype=torch.float32)

    def forward(self, ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        x = self.inner.token(ids)
        if position_ids is None:
            position_ids = torch.arange(ids.shape[1], device=ids.device)[None]
        x = x + torch.sin(position_ids[..., None] * torch.arange(1, x.shape[-1] + 1, device=ids.device))
        for block in self.inner.blocks:
            x = block(x)
        return self.inner.lm(self.inner.last(x))


@torch.no_grad()
def test_shift_at_the_entry() -> None:
    """Promise: the text as prefix is the text as prompt there too, whether positions are given or not."""
    model, text, x = Recorder().eval(), zoo.tokens(51, 1, 4, seed=1), zoo.tokens(51, 1, 6)
    prompted = model(torch.cat((text, x), 1))[:, 4:]
    words = " ".join(map(str, text[0].tolist()))
    program = surgery.parse(f'prefix init text "{words}"')
    surgery.apply(program, model, example_inputs=(x,), tokenizer=lambda t: [int(each) for each in t.split()])
    assert torch.allclose(model(x), prompted, atol=1e-5)
    assert torch.allclose(model(x, torch.arange(6)[None]), prompted, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bart"])
def test_tables_that_count_positions_themselves(name: str) -> None:
    """BART's encoder calls its table without positions: it reads n rows further on, and as before when off."""
    import transformers

    config = transformers.BartConfig(
        vocab_size=61, d_model=24, encoder_layers=1, decoder_layers=1, encoder_attention_heads=3,
        decoder_attention_heads=3, encoder_ffn_dim=31, decoder_ffn_dim=33, max_position_embeddings=40, dropout=0.0,
    )  # fmt: skip
    model = transformers.BartModel(config).eval()
    zoo.fill(model, 0)
    table = model.encoder.embed_positions
    x = zoo.tokens(61, 2, 5)
    before = table(x)
    surgery.apply(surgery.parse("prefix 4"), model)
    assert torch.equal(table(x), table.weight[4 + 2 : 4 + 2 + 5].expand(2, -1, -1))
    assert not torch.equal(table(x), before)
    with surgery.disabled(model):
        assert torch.equal(table(x), before)


def test_gated_prefixes_shift_nothing() -> None:
    model = surgery.apply(surgery.parse("prefix 4 gated"), zoo.tiny("llama"))
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    assert not any(isinstance(hook, Shift) for hook in hooks)


@torch.no_grad()
def test_only_the_layers_with_a_prefix_count() -> None:
    """Prefixes of several lengths in one model: tokens stand behind the longest."""
    model = zoo.tiny("gpt2")
    surgery.apply(surgery.parse("prefix 4 on layers 0\nprefix 7 on layers 1..2"), model)
    seen: list[Any] = []
    # After the shift, which was registered first.
    model.transformer.wpe.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(input_ids=zoo.tokens(50, 1, 3))
    assert seen[0].tolist() == [[7, 8, 9]]
