"""Prefixes where attention has a window: a plain one is seen from everywhere, one of a text as the text would be."""

from __future__ import annotations

import pytest
import torch

import surgery
from tests import others, zoo
from tests.texts import GENERATIONS, IDS, assert_generates_as_prompted, in_front, padded_rows

BY_TEXT = f'prefix init text "{others.TEXT}"'


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("length", [2, 11])
@pytest.mark.parametrize("name", others.WINDOWED)
def test_text_as_prefix_leaves_the_window_as_a_prompt_does(name: str, length: int, implementation: str) -> None:
    """Promise: soft equals hard where a window of 4 is shorter than the text, and than the tokens after it."""
    if (name, implementation) == ("gemma2", "sdpa"):
        implementation = "eager"  # transformers has no other for it; here the window is at its end
        length += 1
    base, model = others.pair(BY_TEXT, name, attn_implementation=implementation)
    x = zoo.tokens(60, 2, length)
    wanted = base(input_ids=in_front(x)).logits[:, IDS.shape[1] :]
    assert (model(input_ids=x).logits - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert (base(input_ids=x).logits - wanted).abs().max() > 1e-2 * wanted.abs().max()


@pytest.mark.parametrize("how", GENERATIONS)
@pytest.mark.parametrize("name", others.WINDOWED)
def test_generate_token_for_token(name: str, how: str) -> None:
    """Promise: the same tokens whatever the padding and the cache, whose window has moved on."""
    base, model = others.pair(BY_TEXT, name)
    assert_generates_as_prompted(model, base, *padded_rows(60, padding=5), how, 8)


@pytest.mark.parametrize(("program", "everywhere"), [("prefix 5", True), (BY_TEXT, False)])
@pytest.mark.parametrize("name", others.WINDOWED)
def test_who_sees_the_prefix(name: str, program: str, everywhere: bool) -> None:
    """A plain prefix is seen by a query far behind the window; one of a text is not, in the layers with a window."""
    _, model = others.pair(program, name)
    model(input_ids=zoo.tokens(60, 1, 12)).logits[0, -1].sum().backward()
    # Of the last layer that has a window: what earlier queries saw in it cannot reach the last one any more.
    kinds = getattr(model.config, "layer_types", None) or ["sliding_attention"] * 2
    windowed = max(layer for layer, kind in enumerate(kinds) if kind == "sliding_attention")
    reached = {
        int(path.split(".")[2]): bool(p.grad is not None and p.grad.abs().sum() > 0)
        for path, p in surgery.parameters(model).items()
        if path.endswith("prefix_value")
    }
    if windowed == len(kinds) - 1:
        assert reached[windowed] == everywhere
    assert reached[0] or not everywhere
