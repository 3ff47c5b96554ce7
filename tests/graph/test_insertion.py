"""Soft rows in front of an encoder's tokens are what as many words there would be, whatever else comes in."""

from __future__ import annotations

import pytest
import torch

from surgery.errors import GraphError, PlanError
from surgery.graph.insertion import Insertion
from surgery.graph.insertion_layout import Layout
from tests import zoo
from tests.graph.encoders import (
    DECODING,
    MODELS,
    WORDS,
    batch,
    build,
    close,
    entrance,
    first,
    joined,
    prompted,
    with_words,
    without_words,
)


@torch.no_grad()
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", list(MODELS))
def test_rows_are_what_words_are(name: str, padding: str) -> None:
    """1e-5 of the largest number in float32, 1e-10 in float64; off, the base to the bit; padding's places left out."""
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        model = build(name, dtype)
        fed = batch(model, padding)
        mask = fed["attention_mask"]
        base, want = first(model, fed), first(model, with_words(fed))
        insertion = prompted(name, model)
        got = first(model, fed)
        real = mask.bool()
        if name in DECODING:
            real = torch.ones(got.shape[:2], dtype=torch.bool)
        else:
            want = without_words(want, mask)
        assert close(got[real], want[real], bound)
        assert not close(got[real], base[real], 1e-3)
        insertion.enabled = False
        assert torch.equal(first(model, fed), base)


@torch.no_grad()
@pytest.mark.parametrize("name", ["roberta", "t5 encoder", "modernbert", "t5"])
def test_the_amount_of_padding_does_not_matter(name: str) -> None:
    """On either side; of models that count positions from the first token or not at all."""
    model = build(name, torch.float64)
    prompted(name, model)
    short = batch(model, "none", length=5)
    want = first(model, short)
    for amount in (1, 6):
        for side in (0, 1):
            parts = {key: value for key, value in short.items() if key != "decoder_input_ids"}
            fill = {"input_ids": model.config.pad_token_id, "attention_mask": 0}
            padding = {key: value.new_full((2, amount), fill[key]) for key, value in parts.items()}
            order = (lambda a, b: [a, b]) if side == 0 else (lambda a, b: [b, a])
            fed = {**short, **{key: torch.cat(order(padding[key], value), 1) for key, value in parts.items()}}
            got = first(model, fed)
            if name not in DECODING:
                got = got[:, amount:] if side == 0 else got[:, :-amount]
            assert close(got, want, 1e-6), (amount, side)  # rotations are computed in float32


@torch.no_grad()
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_positions_and_token_types_of_the_caller(padding: str) -> None:
    """Rows take the first token's position and those after it, and token type zero."""
    model = build("bert", torch.float64)
    fed = batch(model, padding)
    mask = fed["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0) + 2
    types = torch.randint(0, 2, mask.shape, generator=zoo.seeded(1, "types"))
    hard = with_words(fed)
    longer = (hard["attention_mask"].cumsum(1) - 1).clamp(min=0) + 2
    mixed = joined(torch.zeros_like(WORDS), types, mask)
    want = first(model, hard, position_ids=longer, token_type_ids=mixed)
    prompted("bert", model)
    got = first(model, fed, position_ids=positions, token_type_ids=types)
    real = mask.bool()
    assert close(got[real], without_words(want, mask)[real], 1e-10)
    assert not close(got[real], first(model, fed, position_ids=positions)[real], 1e-3)


@torch.no_grad()
def test_positions_for_all_rows_at_once() -> None:
    model = build("bert", torch.float64)
    fed = batch(model, "none")
    prompted("bert", model)
    assert torch.equal(first(model, fed, position_ids=torch.arange(8)[None]), first(model, fed))


@torch.no_grad()
def test_masks_of_every_form() -> None:
    """None, integer, bool, float; of four dimensions as bool or added to scores."""
    model = build("bert", torch.float64)
    fed = batch(model, "right")
    ids, mask = fed["input_ids"], fed["attention_mask"]
    real = mask.bool()
    prompted("bert", model)
    want = model(ids, attention_mask=mask)[0]
    added = torch.zeros(2, 1, 8, 8, dtype=torch.float64).masked_fill(~real[:, None, None], -1e30)
    square = real[:, None, None]
    for form in (real, mask.double(), square, square.expand(2, 1, 8, 8), added):
        assert close(model(ids, attention_mask=form)[0][real], want[real], 1e-8), form.shape
    assert not close(model(ids)[0][real], want[real], 1e-3)
    none = batch(model, "none")
    assert close(model(none["input_ids"])[0], first(model, none), 1e-12)


def test_a_mask_that_cannot_be_extended() -> None:
    model = build("modernbert")
    prompted("modernbert", model)
    fed = batch(model)
    with pytest.raises(GraphError, match="S395"):
        model(fed["input_ids"], attention_mask={"full_attention": None, "sliding_attention": None})
    with pytest.raises(GraphError, match="S395"):
        model(fed["input_ids"], attention_mask=torch.ones(8, 8))
    assert first(model, fed).shape[1] == 8


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "albert", "t5", "bart"])
def test_embeddings_of_the_caller(name: str) -> None:
    model = build(name, torch.float64)
    insertion = prompted(name, model)
    fed = batch(model)
    want = first(model, fed)
    insertion.enabled = False
    embedded = model.get_submodule(insertion.entrance.lookup)(fed.pop("input_ids"))
    insertion.enabled = True
    assert close(first(model, fed, inputs_embeds=embedded), want, 1e-10)


def test_no_room_for_positions() -> None:
    """While planning when no token would fit, and when called with too long a text; learned tables start late."""
    model = build("roberta")
    at = entrance("roberta", model)
    assert at.room == 38  # of 40 rows, two are left out
    with pytest.raises(PlanError, match="S393"):
        at.check(38)
    (warning,) = at.check(3)
    assert "35 tokens at most" in warning
    insertion = prompted("roberta", model)
    ids = torch.full((1, 36), 9)
    assert first(model, {"input_ids": ids[:, :35]}).shape[1] == 35
    with pytest.raises(GraphError, match="cut the text to 35 tokens"):
        model(ids)
    insertion.enabled = False
    assert first(model, {"input_ids": ids}).shape[1] == 36
    assert entrance("t5", build("t5")).room is None
    assert entrance("mpnet", build("mpnet")).room == 38  # and not the few rows of its table of distances


@torch.no_grad()
def test_no_rows_are_none() -> None:
    model = build("bert")
    fed = batch(model)
    base = first(model, fed)
    at = entrance("bert", model)
    for nothing in (None, torch.zeros(0, 24)):
        insertion = Insertion(at, lambda given=nothing: given)
        insertion.install(model)
        assert torch.equal(first(model, fed), base)
        insertion.remove(model)


@torch.no_grad()
def test_rows_that_differ_over_the_batch() -> None:
    model = build("bert", torch.float64)
    at = entrance("bert", model)
    rows = torch.randn(2, 3, 24, dtype=torch.float64, generator=zoo.seeded(0, "rows"))
    chosen = [rows]
    Insertion(at, lambda: chosen[0]).install(model)
    fed = batch(model)
    both = first(model, fed)
    for row in range(2):
        chosen[0] = rows[row]
        assert close(first(model, fed)[row], both[row], 1e-10)


def test_the_order_of_padding_rows_and_tokens() -> None:
    """[padding, rows, tokens] in each row of a batch; cutting undoes it, also of a longer sequence."""
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]])
    layout = Layout.behind(2, 4, mask)
    tokens = torch.arange(12).view(3, 4) + 10
    rows = torch.tensor([[1, 2]])
    put = layout.put(rows, tokens)
    want = [[10, 11, 1, 2, 12, 13], [1, 2, 14, 15, 16, 17], [18, 19, 20, 21, 1, 2]]
    assert put.tolist() == want
    assert torch.equal(layout.cut(put), tokens)
    longer = torch.cat([put, tokens[:, :1]], 1)
    assert torch.equal(layout.cut(longer), torch.cat([tokens, tokens[:, :1]], 1))
    assert layout.replace(rows[..., None] + 5, put[..., None]).squeeze(-1).tolist() == [
        [10, 11, 6, 7, 12, 13],
        [6, 7, 14, 15, 16, 17],
        [18, 19, 20, 21, 6, 7],
    ]
    assert Layout.behind(2, 4, mask == 0, padding=True).left.tolist() == [[2], [0], [4]]  # type: ignore[union-attr]
