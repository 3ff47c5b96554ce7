"""Running code on an affine value gives its matrix and offset, or the reason why it has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from surgery.graph.affine import Affine, NotAffine
from surgery.graph.functions import add_to_channels

W = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
V = torch.randn(4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
B = torch.randn(5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
ROWS = torch.tensor([0, 3])

MAPS: dict[str, Callable[[Any], Any]] = {
    "linear": lambda x: F.linear(x, W, B),
    "two in a row": lambda x: F.linear(F.linear(x, W, B), V),
    "scaled rows": lambda x: F.linear(x, W, B) * B,
    "number in front": lambda x: 3 * F.linear(x, W) - B,
    "vector less": lambda x: B - F.linear(x, W),
    "quotient": lambda x: F.linear(x, W, B) / 2,
    "addmm": lambda x: torch.addmm(B, x, W.t()),
    "matmul": lambda x: torch.matmul(x, W.t()) + B,
    "at sign": lambda x: x @ W.t(),
    "sum of branches": lambda x: F.linear(x, W, B) + F.linear(F.dropout(x, 0.5, False), 2 * W),
    "some channels": lambda x: add_to_channels(F.linear(x, W, B), F.linear(x, W[:2]), ROWS),
    "identity": lambda x: x + 1,
    "negated": lambda x: -x,
}


@pytest.mark.parametrize("name", MAPS)
def test_matrix_and_offset_are_those_of_the_code(name: str) -> None:
    """merges: M = G(I) - G(0), read off by calling the code with numbers, is what the affine value says."""
    code = MAPS[name]
    value = code(Affine(3, dtype=torch.float64))
    offset = code(torch.zeros(1, 3, dtype=torch.float64))[0]
    matrix = (code(torch.eye(3, dtype=torch.float64)) - offset).t()
    torch.testing.assert_close(value.dense(), matrix, rtol=1e-13, atol=1e-13)
    found = torch.zeros_like(offset) if value.offset is None else value.offset
    torch.testing.assert_close(found.expand_as(offset), offset, rtol=1e-13, atol=1e-13)
    assert matrix.abs().max() > 0.1


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (lambda x: F.relu(x), "relu"),
        (lambda x: x * x, "with itself"),
        (lambda x: F.linear(x, W).softmax(-1), "softmax"),
        (lambda x: 1 / x, "divides"),
        (lambda x: F.linear(x, W) * torch.ones(2, 5), "between positions"),
        (lambda x: F.linear(torch.zeros(1, 3), x), "weight"),
        (lambda x: torch.index_select(x, 0, ROWS), "another dimension"),
    ],
)
def test_what_is_not_affine_says_why(code: Callable[[Any], Any], reason: str) -> None:
    """merges: no matrix is made up for code that has none."""
    with pytest.raises(NotAffine, match=reason):
        code(Affine(3))


def test_token_ids_are_only_looked_up() -> None:
    """A one-hot row goes to the table; anything else done to token ids is refused."""
    table = torch.randn(7, 4)
    assert torch.equal(F.embedding(Affine(7, one_hot=True), table).dense(), table.t())
    for code in (lambda ids: ids + 1, lambda ids: ids * 2, lambda ids: F.linear(ids, W)):
        with pytest.raises(NotAffine, match="token ids"):
            code(Affine(7, one_hot=True))
    with pytest.raises(NotAffine):
        F.embedding(Affine(7), table)
