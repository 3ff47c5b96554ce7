"""A small causal decoder in plain torch that never casts, for proofs at 1e-12: transformers models cast inside."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Shape:
    """Everything that distinguishes one reference decoder from another.

    attention: `causal` calls scaled_dot_product_attention with `is_causal`, `masked` calls it with a mask,
        `hand` multiplies, adds, normalises and multiplies.
    positions: `rotary` turns queries and keys, `learned` adds rows of a table of `length` rows.
    fused: one projection for query, key and value.
    """

    vocabulary: int = 61
    width: int = 32
    layers: int = 2
    heads: int = 4
    key_value_heads: int = 2
    ffn: int = 48
    length: int = 64
    positions: Literal["rotary", "learned"] = "rotary"
    attention: Literal["causal", "masked", "hand"] = "masked"
    gated: bool = True
    fused: bool = False
    bias: bool = False
    tied: bool = False

    @property
    def head_width(self) -> int:
        return self.width // self.heads


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class Rotary(nn.Module):
    """Cosine and sine of position times frequency, (batch, 1, length, head width), in the dtype of `like`."""

    def __init__(self, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width

    def forward(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        exponents = torch.arange(0, self.head_width, 2, device=like.device, dtype=like.dtype) / self.head_width
        angles = positions.to(like.dtype)[:, None, :, None] * (10000.0**-exponents)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        # Numbers of its own, as modules have them that can lose heads.
        self.heads, self.key_value_heads, self.head_width = shape.heads, shape.key_value_heads, shape.head_width
        key_value = shape.key_value_heads * shape.head_width
        if shape.fused:
            self.qkv = nn.Linear(shape.width, shape.width + 2 * key_value, bias=shape.bias)
        else:
            self.q = nn.Linear(shape.width, shape.width, bias=shape.bias)
            self.k = nn.Linear(shape.width, key_value, bias=shape.bias)
            self.v = nn.Linear(shape.width, key_value, bias=shape.bias)
        self.o = nn.Linear(shape.width, shape.width, bias=shape.bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        shape, groups = self.shape, self.heads // self.key_value_heads
        batch, length, _ = x.shape
        key_value = self.key_value_heads * self.head_width
        if shape.fused:
            q, k, v = self.qkv(x).split((self.heads * self.head_width, key_value, key_value), dim=-1)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        q = q.view(batch, length, self.heads, self.head_width).transpose(1, 2)
        k = k.view(batch, length, self.key_value_heads, self.head_width).transpose(1, 2)
        v = v.view(batch, length, self.key_value_heads, self.head_width).transpose(1, 2)
        if shape.positions == "rotary":
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        if shape.attention == "causal":
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif shape.attention == "masked":
            out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_width)
            out = functional.softmax(scores.masked_fill(~mask, -1e30), dim=-1) @ v
        return self.o(out.transpose(1, 2).reshape(batch, length, self.heads * self.head_width))


class FeedForward(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.up = nn.Linear(shape.width, shape.ffn, bias=shape.bias)
        self.gate = nn.Linear(shape.width, shape.ffn, bias=shape.bias) if shape.gated else None
        self.down = nn.Linear(shape.ffn, shape.width, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(functional.gelu(self.up(x)))
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(shape.width), Attention(shape)
        self.ffn_norm, self.ffn = RMSNorm(shape.width), FeedForward(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, mask)
        return x + self.ffn(self.ffn_norm(x))


class ReferenceDecoder(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(shape.vocabulary, shape.width)
        self.position = nn.Embedding(shape.length, shape.width) if shape.positions == "learned" else None
        self.rotary = Rotary(shape.head_width)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        if shape.tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Logits (batch, length, vocabulary) of tokens (batch, length).

        mask: (batch, length), true where there is a token and not padding (not with attention `causal`).
        positions: (batch or 1, length); counted from 0 when not given.
        """
        length = tokens.shape[1]
        if positions is None:
            positions = torch.arange(length, device=tokens.device)[None]
        x = self.embed(tokens)
        if self.position is not None:
            x = x + self.position(positions)
        cos, sin = self.rotary(positions, x)
        visible = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()[None, None]
        if mask is not None:
            # a padded query sees itself, so that its softmax is over something
            itself = torch.eye(length, dtype=torch.bool, device=tokens.device)
            visible = visible & mask[:, None, None, :].bool() | itself
        for layer in self.layers:
            x = layer(x, cos, sin, visible)
        return self.head(self.norm(x))


def reference_decoder(
    shape: Shape | None = None, seed: int = 0, dtype: torch.dtype = torch.float64
) -> ReferenceDecoder:
    """A decoder in eval mode, its weights drawn from one seed so that every layer matters."""
    shape = shape or Shape()
    model = ReferenceDecoder(shape).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(1.0 + 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            else:
                spread = 1.0 / math.sqrt(parameter.shape[-1])
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model
