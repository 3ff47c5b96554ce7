"""Where n rows stand among a batch of padded tokens, and what that makes of masks, positions and token types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surgery.errors import GraphError
from surgery.graph.entry import ARGUMENTS

PADDING = ("padding_mask", "pad_mask")
"""Endings of masks that are true at padding."""
ELSEWHERE = ("head_", "cross_", "encoder_", "decoder_", "memory_", "global_")
"""Beginnings of masks that are not over the tokens, or choose among them."""
BESIDE = ("bbox", "langs")
"""What stands beside the tokens, one for each, without being called ids."""


@dataclass(frozen=True)
class Layout:
    """n rows in front of `length` tokens, behind the padding on the left.

    left: (batch, 1), how many places of padding come first; None where there is no padding to come behind. A row of
    the batch is then [padding, rows, tokens], as a tokenizer pads a text that begins with as many more tokens.
    """

    n: int
    length: int
    left: Tensor | None = None

    @classmethod
    def behind(cls, n: int, length: int, mask: Tensor | None, padding: bool = False) -> Layout:
        """By a mask (batch, length) that is zero at padding, or, with `padding`, true there; front without one."""
        if mask is None or mask.dim() != 2:
            return cls(n, length)
        real = mask == 0 if padding else mask != 0
        return cls(n, length, (real.cumsum(1) == 0).sum(1, keepdim=True))

    def put(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """rows (1 or batch, n, ...) among tokens (1 or batch, length, ...): (batch, n + length, ...)."""
        batch = max(len(rows), len(tokens), 1 if self.left is None else len(self.left))
        both = torch.cat([_widened(rows, batch), _widened(tokens, batch)], 1)
        if self.left is None:
            return both
        slot = torch.arange(self.n + self.length, device=both.device)
        behind = torch.where(slot < self.left + self.n, slot - self.left, slot)
        return _taken(both, torch.where(slot < self.left, slot + self.n, behind))

    def replace(self, rows: Tensor, values: Tensor) -> Tensor:
        """values (batch, n + length, width) with the rows (1 or batch, n, width) where they stand."""
        rows = _widened(rows, len(values))
        if self.left is None:
            return torch.cat([rows, values[:, self.n :]], 1)
        place = self.left + torch.arange(self.n, device=values.device)
        return values.scatter(1, place[..., None].expand(-1, -1, values.shape[-1]), rows)

    def cut(self, values: Tensor) -> Tensor:
        """values (batch, n + length or more, ...) without the rows' places."""
        if self.left is None:
            return values[:, self.n :]
        slot = torch.arange(values.shape[1] - self.n, device=values.device)
        return _taken(values, torch.where(slot < self.left, slot, slot + self.n))

    def last(self, values: Tensor) -> Tensor:
        """values (batch, n + length, width) at the last of the rows' places: (batch, 1, width)."""
        if self.left is None:
            return values[:, self.n - 1 : self.n]
        return _taken(values, self.left + self.n - 1)

    def fits(self, value: Any) -> bool:
        """Whether it is a value for each place, rows' places included."""
        return isinstance(value, Tensor) and value.dim() == 3 and value.shape[1] == self.n + self.length

    def cut_nested(self, output: Any) -> Any:
        """An output whose inner tuples, such as all hidden states, have lost the rows' places."""
        if isinstance(output, dict):  # as transformers' outputs are
            for name, value in output.items():
                if isinstance(value, tuple):
                    output[name] = self._each(value)
            return output
        if type(output) is tuple:
            return tuple(self._each(value) if type(value) is tuple else value for value in output)
        return output

    def _each(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(self.cut(value) if self.fits(value) else value for value in values)

    # What goes with the tokens

    def positions(self, given: Tensor) -> Tensor:
        """Rows take the first token's position and those after it; tokens stand n further on, padding where it was."""
        if self.left is None:
            first, shifted = given[:, :1], given + self.n
        else:
            given = _widened(given, len(self.left))
            first = given.gather(1, self.left.clamp(max=self.length - 1))
            shifted = given + self.n * (torch.arange(self.length, device=given.device) >= self.left)
        return self.put(first + torch.arange(self.n, device=given.device), shifted)

    def mask(self, given: Tensor, padding: bool = False) -> Tensor:
        """A mask that lets every token attend to the rows, and the rows to what any token attends to."""
        additive = given.is_floating_point() and given.dim() > 2
        seen = 0 if padding or additive else 1
        if given.dim() == 2:
            return self.put(given.new_full((len(given), self.n), seen), given)
        if given.shape[-2] == self.length:  # else all queries share what they attend to
            most = torch.any if given.dtype == torch.bool else torch.amax
            top = most(given, -2, keepdim=True)
            given = torch.cat([top.expand(*given.shape[:-2], self.n, given.shape[-1]), given], -2)
        return torch.cat([given.new_full((*given.shape[:-1], self.n), seen), given], -1)

    def beside(self, given: Tensor) -> Tensor:
        """Token types and the like: zero for the rows."""
        return self.put(given.new_zeros((1, self.n, *given.shape[2:])), given)


def is_mask(name: str) -> bool:
    """Whether an argument of this name says which tokens are attended to."""
    return name.endswith("mask") and not name.startswith(ELSEWHERE)


def marks_padding(name: str) -> bool:
    """Whether a mask of this name is true at padding, as torch's own are."""
    return name.endswith(PADDING)


def extended(name: str, value: Any, layout: Layout, batch: int) -> Any:
    """An argument that goes with the tokens, as it is with the rows among them; any other as it is."""
    if value is None:
        return None
    if is_mask(name) and not _over_tokens(value, batch):
        what = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise GraphError.of(
            "S395",
            f"`{name}` is {what}, which rows in front of the tokens cannot be added to",
            help="pass a tensor (batch, length) that tells tokens from padding",
        )
    if not isinstance(value, Tensor) or value.dim() < 2 or layout.length not in (value.shape[1], value.shape[-1]):
        return value
    if is_mask(name):
        return layout.mask(value, marks_padding(name))
    if value.shape[1] != layout.length:
        return value
    if name in ARGUMENTS:
        return layout.positions(value)
    if name.endswith("_ids") or name in BESIDE or name == "global_attention_mask":
        return layout.beside(value)
    return value


def _over_tokens(mask: Any, batch: int) -> bool:
    """Whether a mask is (batch, length), or of more dimensions and not the other way round."""
    return isinstance(mask, Tensor) and (mask.dim() > 2 or (mask.dim() == 2 and len(mask) in (1, batch)))


def _widened(values: Tensor, batch: int) -> Tensor:
    return values if len(values) == batch else values.expand(batch, *values.shape[1:])


def _taken(values: Tensor, places: Tensor) -> Tensor:
    """values (batch, m, ...) at places (batch, k): (batch, k, ...)."""
    index = places.view(*places.shape, *(1 for _ in values.shape[2:]))
    return values.gather(1, index.expand(*places.shape, *values.shape[2:]))


__all__ = ["Layout", "extended", "is_mask", "marks_padding"]
