"""Channels that cannot be cut: widths that are worked out, streams that are mixed, shares and sizes that do not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.errors import PlanError
from tests import zoo
from tests.operations.cut import TOKENS, decoder
from tests.refusals import assert_refused


@pytest.mark.parametrize("name", ["nano", "byhand"])
def test_heads_whose_width_is_worked_out_from_the_stream_are_refused(name: str) -> None:
    """Narrower channels would make narrower heads of them."""
    given = {"example_inputs": (zoo.tokens(51, 2, 6),)}
    assert_refused("prune channels 30%", zoo.plain(name, depth=1), "S332", "as an attribute", PlanError, **given)


class Convolved(nn.Module):
    """Channels are mixed with their neighbours by fixed numbers: no stored matrix says which belong together."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(61, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.head = nn.Linear(16, 61)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + torch.relu(layer(x.roll(1, -1) + x))
        out: Tensor = self.head(x)
        return out


class Inline(Convolved):
    """A norm written into the layer: nothing holds its eps, and its gain is nobody's."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + torch.relu(layer(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)))
        out: Tensor = self.head(x)
        return out


class Headless(Convolved):
    """What comes out is the stream."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return x


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Convolved, "cannot cut what"),
        (Inline, "computes a norm of the channels among other things"),
        (Headless, "cannot narrow the model's output"),
    ],
)
def test_a_stream_that_cannot_be_cut_is_refused_with_the_place(kind: type[nn.Module], said: str) -> None:
    told = assert_refused("prune channels 25%", kind(), "S135", said, PlanError, example_inputs=(TOKENS,))
    assert len(told.diagnostics) == 1


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        ("prune channels 99%", "S161", "without channels"),
        ("prune channels 30% round to 16", "S160", "50% (16 stay)"),
        ("prune channels 30% ; prune channels 20% by random", "S103", "prune channels 20% by random"),
    ],
)
def test_shares_that_cannot_be_had_say_what_can(program: str, code: str, said: str) -> None:
    assert_refused(program, decoder(), code, said, PlanError, example_inputs=(TOKENS,))


def test_sizes_that_grouped_products_cannot_take() -> None:
    model = zoo.tiny("mixtral")
    with pytest.raises(surgery.SurgeryError, match=r"S332.* it cannot run .*multiple of 16 bytes"):
        surgery.apply(surgery.parse("prune channels 25%"), model)
