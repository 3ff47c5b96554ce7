"""One decoder whose attention is written in many ways, all of which compute the same numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, einsum, nn

WIDTH, HEADS, VOCABULARY = 12, 3, 23
HEAD = WIDTH // HEADS


class Attention(nn.Module):
    """Projections and an output map; a form says what is between. shared: all heads read the same keys and values."""

    shared = False

    def __init__(self) -> None:
        super().__init__()
        keys = HEAD if self.shared else WIDTH
        self.query, self.key, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, keys), nn.Linear(WIDTH, keys)
        self.out, self.dropout, self.softmax = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1), nn.Softmax(dim=-1)
        self.factor, self.never = torch.tensor(HEAD**-0.5), torch.tensor(-1e30)  # neither parameters nor buffers
        self.log_factor = nn.Parameter(torch.full((1, HEADS, 1, 1), -math.log(HEAD) / 2, dtype=torch.float64))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(batch, heads, tokens, width of a head) each."""
        batch, length, _ = x.shape
        query = self.query(x).view(batch, length, HEADS, HEAD).transpose(1, 2)
        key, value = (each(x).view(batch, length, -1, HEAD).transpose(1, 2) for each in (self.key, self.value))
        return query, key, value

    def join(self, x: Tensor) -> Tensor:
        return self.out(x.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def earlier(x: Tensor) -> Tensor:
    """(tokens, tokens): which tokens a token sees."""
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()


class Fused(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return self.join(F.scaled_dot_product_attention(*self.split(x), is_causal=True))


class MadeNowhere(Attention):
    """Tensors are made without saying on which device."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(x)
        length = x.shape[1]
        scores = (query @ key.mT) * HEAD**-0.5 + torch.triu(torch.full((length, length), float("-inf")), 1).to(x)
        return self.join(scores.softmax(-1) @ value)


class CountedNowhere(Attention):
    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(x)
        place = torch.arange(x.shape[1])
        scores = (query @ key.mT) / math.sqrt(HEAD)
        scores = torch.where(place[None, :] > place[:, None], torch.finfo(scores.dtype).min, scores)
        return self.join(scores.softmax(-1) @ value)


class Constants(Attention):
    """Numbers that are tensors: made in the forward, or kept in plain attributes."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(x)
        scores = torch.where(earlier(x), (query @ key.mT) * self.factor, self.never)
        scores = torch.where(earlier(x), scores, torch.tensor(-1e30))
        return self.join(scores.softmax(-1) @ value)


class Likes(Attention):
    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(x)
        scores = (query @ key.mT) * HEAD**-0.5
        scores = torch.where(earlier(x), scores, torch.full_like(scores, -1e30))
        return self.join(self.dropout(self.softmax(scores)) @ value)


class InPlace(Attention):
    """Values come last, when the weights are there."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, _ = self.split(x)
        scores = query @ key.mT
        scores /= math.sqrt(HEAD)
        scores.masked_fill_(~earlier(x), float("-inf"))
        weights = scores.softmax(-1)
        value = self.value(x).view(*x.shape[:2], -1, HEAD).transpose(1, 2)
        return self.join(weights @ value)


class Learned(Attention):
    """The scale is a parameter of each head."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(x)
        scores = (query @ key.mT) * self.log_factor.clamp(max=5).exp()
        return self.join(scores.masked_fill(~earlier(x), -1e30).softmax(-1) @ value)


class Einsum(Attention):
    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (each.transpose(1, 2) for each in self.split(x))
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * HEAD**-0.5
        weights = scores.masked_fill(~earlier(x), torch.finfo(scores.dtype).min).softmax(-1)
        return self.out(torch.einsum("bhqk,bkhd->bqhd", weights, value).flatten(2))  # type: ignore[no-any-return]


class Einops(Attention):
    def forward(self, x: Tensor) -> Tensor:
        states = (self.query(x), *torch.cat((self.key(x), self.value(x)), -1).chunk(2, dim=-1))
        query, key, value = (rearrange(each, "b n (h d) -> b h n d", h=HEADS) for each in states)
        scores = einsum("b h i d, b h j d -> b h i j", query * HEAD**-0.5, key)
        rows, columns = scores.shape[-2:]
        later = torch.ones((rows, columns), dtype=torch.bool, device=x.device).triu(columns - rows + 1)
        weights = self.dropout(scores.masked_fill(later, -torch.finfo(scores.dtype).max).softmax(dim=-1))
        out = einsum("b h i j, b h j d -> b h i d", weights, value)
        return self.out(rearrange(out, "b h n d -> b n (h d)"))  # type: ignore[no-any-return]


class SharedFused(Attention):
    shared = True

    def forward(self, x: Tensor) -> Tensor:
        return self.join(F.scaled_dot_product_attention(*self.split(x), is_causal=True, enable_gqa=True))


class SharedEinsum(Attention):
    shared = True

    def forward(self, x: Tensor) -> Tensor:
        query = rearrange(self.query(x), "b n (h d) -> b h n d", h=HEADS)
        scores = einsum("b h i d, b j d -> b h i j", query * HEAD**-0.5, self.key(x))
        weights = scores.masked_fill(~earlier(x), -1e30).softmax(-1)
        return self.join(einsum("b h i j, b j d -> b h i d", weights, self.value(x)))


FORMS = (MadeNowhere, CountedNowhere, Constants, Likes, InPlace, Learned, Einsum, Einops, SharedEinsum)


class Block(nn.Module):
    def __init__(self, attention: Callable[[], Attention]) -> None:
        super().__init__()
        self.before, self.attention, self.between = nn.LayerNorm(WIDTH), attention(), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        return x + self.down(F.gelu(self.up(self.between(x))))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    def __init__(self, attention: Callable[[], Attention]) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(VOCABULARY, WIDTH), nn.ModuleList([Block(attention) for _ in range(2)])
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)  # type: ignore[no-any-return]


def decoder(attention: Callable[[], Attention], dtype: torch.dtype = torch.float64) -> Any:
    """The same weights whatever the form."""
    torch.manual_seed(0)
    return Decoder(attention).to(dtype).eval()
