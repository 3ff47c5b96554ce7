"""Prefixes that cannot be: as a statement, without attention, without room, without a tokenizer."""

from __future__ import annotations

import pytest
import torch

import surgery
from surgery.errors import SurgeryError
from tests import zoo

MISTAKES = {
    "prefix": "S",
    "prefix 0": "S",
    'prefix 4 via mlp 8 init text "w3"': "S",
    'prefix init text ""': "S",
    "prefix 4 via lstm": "S",
}


@pytest.mark.parametrize("program", MISTAKES)
def test_mistakes_are_refused_before_there_is_a_model(program: str) -> None:
    with pytest.raises(SurgeryError) as caught:
        surgery.parse(program)
    assert all(diagnostic.span is not None for diagnostic in caught.value.diagnostics)


def test_a_model_without_attention_is_told_so() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    with pytest.raises(SurgeryError, match=r"S20\d"):
        surgery.plan(surgery.parse("prefix 20 on all layers"), model, example_inputs=(torch.randn(2, 4),))


def test_no_room_in_a_table_of_positions() -> None:
    """A prefix as long as the table leaves no token a position; a shorter one is warned of."""
    model = zoo.tiny("gpt2")
    with pytest.raises(SurgeryError, match="S346"):
        surgery.plan(surgery.parse("prefix 64"), model)
    assert "44 tokens at most" in str(surgery.plan(surgery.parse("prefix 20"), model))


def test_a_text_needs_a_tokenizer() -> None:
    with pytest.raises(SurgeryError, match=r"S104|S347"):
        surgery.apply(surgery.parse('prefix init text "w3 w4"'), zoo.tiny("llama"))
