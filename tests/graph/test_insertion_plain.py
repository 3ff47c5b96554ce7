"""Soft rows in encoders of plain torch, and models in front of whose tokens none can stand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import surgery
from surgery.errors import GraphError, PlanError
from surgery.graph.insertion import Entrance, Insertion
from tests import zoo
from tests.graph.encoders import WORDS, Soft, batch, close, joined, without_words


class Block(nn.Module):
    """Attention both ways and a relu network, of plain torch."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.before(x)).split(width, dim=2)
        q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in parts)
        seen = None if mask is None else mask[:, None, None].bool()
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.narrow(F.relu(self.wide(self.after(x))))


class PlainEncoder(nn.Module):
    """Embedding, positions, layers, norm, the mean over tokens and a head, all in one module."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.token, self.place = nn.Embedding(51, 21), nn.Embedding(30, 21)
        self.blocks = nn.ModuleList(Block(21, 3, 33) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(21), nn.Linear(21, 4)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.token(ids) + self.place(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x, mask) if self.reentrant is None else checkpoint(block, x, mask, use_reentrant=self.reentrant)
        self.seen = x
        return self.head(self.norm(x).mean(1))


def plain(reentrant: bool | None = None) -> tuple[PlainEncoder, Insertion]:
    model = PlainEncoder()
    zoo.fill(model, 0)
    model = model.double()
    ids = zoo.tokens(51)
    found = surgery.study(model, (ids, torch.ones_like(ids)))
    model.reentrant = reentrant
    at = Entrance.find(model, found, found.stacks[0])
    with torch.no_grad():
        model.add_module("soft", Soft(model.token(WORDS).clone()))
    insertion = Insertion(at, model.soft.rows)
    insertion.install(model)
    return model, insertion


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 2])
def test_an_encoder_of_plain_torch(padding: int) -> None:
    """The mean over tokens, taken in the same module that embeds them, is over the caller's tokens."""
    model, insertion = plain()
    assert insertion.entrance.leave == "blocks.2"
    ids = zoo.tokens(51)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    insertion.enabled = False
    model(joined(WORDS, ids, mask), joined(torch.ones_like(WORDS), mask, mask))
    hidden = without_words(model.seen, mask)
    insertion.enabled = True
    got = model(ids, mask)
    assert close(got, model.head(model.norm(hidden).mean(1)), 1e-10)
    with pytest.raises(GraphError, match="S393"):
        model(zoo.tokens(51, length=28))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_the_last_layer(reentrant: bool) -> None:
    """The layer runs again when the call is long over, with another call in between, and is cut as it was."""
    ids = zoo.tokens(51)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    found = []
    for way in (None, reentrant):
        model, _ = plain(way)
        model.requires_grad_(False)
        model.soft.requires_grad_(True)
        one = model(ids, mask)
        model(ids[:, :4])
        one.square().sum().backward()
        found.append(model.soft.weight.grad)
    assert close(found[1], found[0], 1e-12)


@torch.no_grad()
def test_torch_s_own_encoder_and_its_padding_mask() -> None:
    """A padding mask is true at padding, so the rows are false in it."""

    class Torch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(24, 3, 40, dropout=0.0, batch_first=True)
            self.token = nn.Embedding(51, 24)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, ids: Tensor, padding_mask: Tensor | None = None) -> Tensor:
            out: Tensor = self.encoder(self.token(ids), src_key_padding_mask=padding_mask)
            return out

    model = Torch().double().eval()
    zoo.fill(model, 0)
    ids = zoo.tokens(51)
    real = torch.ones_like(ids)
    real[0, :3] = 0
    found = surgery.study(model, (ids,))
    want = model(joined(WORDS, ids, real), padding_mask=joined(torch.ones_like(WORDS), real, real) == 0)
    at = Entrance.find(model, found, found.stacks[0])
    rows = model.token(WORDS)
    Insertion(at, lambda: rows).install(model)
    got = model(ids, padding_mask=real == 0)
    assert close(got[real.bool()], without_words(want, real)[real.bool()], 1e-10)


def test_layers_that_shorten_the_sequence() -> None:
    """Said, not computed wrongly."""
    from transformers import FunnelConfig, FunnelForMaskedLM

    shape = {"vocab_size": 58, "d_model": 24, "n_head": 3, "d_head": 8, "d_inner": 34}
    model = FunnelForMaskedLM(FunnelConfig(**shape, block_sizes=[1, 1], num_decoder_layers=1)).eval()
    found = surgery.study(model)
    at = Entrance.find(model, found, found.stacks[0])
    Insertion(at, lambda: torch.zeros(3, 24)).install(model)
    with pytest.raises(GraphError, match="S394"):
        model(**batch(model, "none"))


def test_a_model_without_word_embeddings() -> None:
    model = nn.Sequential(*(Block(21, 3, 33) for _ in range(3)))
    found = surgery.study(model, (torch.randn(2, 5, 21),))
    with pytest.raises(PlanError, match="S394"):
        Entrance.find(model, found, found.stacks[0])
