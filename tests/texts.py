"""A text in front of tokens: in a program, by hand, and what is generated behind it. Prefixes and prompts are that."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import surgery
from tests import others, zoo

IDS = torch.tensor([others.IDS])
TEXT = "w5 w9 w33 w12 w17"
WAYS = {
    "instruct": f'instruct "{TEXT}"',
    "cached": f'instruct "{TEXT}" cached',
    "prompt": f'prompt init text "{TEXT}"',
    "prefix": f'prefix init text "{TEXT}"',
}
CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "none": {"use_cache": False},
    "static": {"cache_implementation": "static", "disable_compile": True},
}
GENERATIONS = {**CACHES, "beams": {"num_beams": 3}}
MORE_GENERATIONS = {**GENERATIONS, "static-beams": {"num_beams": 3, **CACHES["static"]}}


def ids_of(text: str) -> list[int]:
    """A tokenizer of words that say their numbers."""
    return [int(word[1:]) for word in text.split()]


def transformed(program: str, model: Any, *example: Tensor) -> Any:
    return surgery.apply(surgery.parse(program), model, example_inputs=example or None, tokenizer=ids_of)


def in_front(x: Tensor, ids: Tensor = IDS) -> Tensor:
    """Tokens (rows, length), each row behind the same others (1, length)."""
    return torch.cat((ids.expand(len(x), -1), x), 1)


def padded_rows(vocabulary: int, padding: int = 4) -> tuple[Tensor, Tensor]:
    """Tokens and mask (3, 7): the first row padded so far on the left, the second not at all, the last by one place."""
    x, mask = zoo.tokens(vocabulary, 3, 7), torch.ones(3, 7, dtype=torch.long)
    mask[0, :padding] = 0
    mask[2, :1] = 0
    return x * mask, mask


def assert_generates_as_prompted(model: Any, base: Any, x: Tensor, mask: Tensor, how: str, count: int) -> None:
    """Token for token, each row of a padded batch generates what the base does when prompted with text and row."""
    length, kind = {"max_new_tokens": count, "do_sample": False}, MORE_GENERATIONS[how]
    got = model.generate(x, attention_mask=mask, **length, **kind)[:, x.shape[1] :]
    beams = {"num_beams": kind.get("num_beams", 1)}
    for row, seen, tokens in zip(x, mask.bool(), got, strict=True):
        prompt = in_front(row[seen][None])
        wanted = base.generate(prompt, attention_mask=torch.ones_like(prompt), **length, **beams)[0, prompt.shape[1] :]
        assert tokens.tolist() == wanted.tolist()
