"""Soft rows show in no output but what a decoder reads; copies have their own, and a failed call leaves nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import surgery
from surgery.graph.insertion import Entrance, Insertion
from tests import zoo
from tests.graph.encoders import (
    DECODING,
    SHAPE,
    WORDS,
    anatomy,
    batch,
    build,
    close,
    first,
    prompted,
    with_words,
    without_words,
)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "modernbert", "t5 encoder", "albert"])
def test_hidden_states_keep_the_length(name: str) -> None:
    """All of them, also as a tuple of tuples; attention weights show the rows."""
    model = build(name)
    model.set_attn_implementation("eager")
    prompted(name, model)
    fed = batch(model)
    out = model(**fed, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) >= 3
    assert all(each.shape[1] == 8 for each in out.hidden_states)
    assert all(each.shape[-2:] == (11, 11) for each in out.attentions)
    plain = model(**fed, output_hidden_states=True, return_dict=False)
    assert torch.equal(plain[0], out[0])
    assert all(torch.equal(one, two) for one, two in zip(plain[1], out.hidden_states, strict=True))


@torch.no_grad()
def test_poolers_and_heads_see_the_callers_tokens() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(BertConfig(**SHAPE, num_labels=4)).eval()
    zoo.fill(model, 0)
    found = surgery.study(model)
    fed = batch(model)
    hidden = model.bert(**with_words(fed))[0]
    cls = without_words(hidden, fed["attention_mask"])[:, :1]
    want = model.classifier(model.bert.pooler(cls))
    at = Entrance.find(model, found, found.stacks[0])
    rows = model.get_submodule(at.lookup)(WORDS)
    Insertion(at, lambda: rows).install(model)
    assert close(model(**fed).logits, want, 1e-5)


def test_losses_are_those_of_the_callers_tokens() -> None:
    for name in ("bert", "bert labels"):
        model = build(name)
        prompted(name, model)
        fed = batch(model, "right")
        kinds = 5 if name == "bert labels" else 58
        labels = torch.randint(0, kinds, (2, 8), generator=zoo.seeded(0, "labels"))
        labels[0, 5:] = -100
        out = model(**fed, labels=labels)
        assert torch.allclose(out.loss, F.cross_entropy(out.logits.flatten(0, 1), labels.flatten()))


@pytest.mark.parametrize("name", DECODING)
def test_a_decoder_attends_to_the_rows(name: str) -> None:
    """The encoder's output is longer, may be given back by the caller, and generates what the words would."""
    model = build(name)
    fed = batch(model)
    start = fed.pop("decoder_input_ids")
    ways: list[dict[str, Any]] = [
        {},
        {"num_beams": 3},
        {"use_cache": False},
        {"num_beams": 2, "num_return_sequences": 2},
    ]
    ways = [{"max_new_tokens": 5, "do_sample": False, "min_new_tokens": 5, **way} for way in ways]
    hard = with_words(fed)
    want = [model.generate(**hard, **way) for way in ways]
    base = [model.generate(**fed, **way) for way in ways]
    with torch.no_grad():
        prompted(name, model)
        got = [model.generate(**fed, **way) for way in ways]
        assert all(torch.equal(one, two) for one, two in zip(got, want, strict=True))
        assert not all(torch.equal(one, two) for one, two in zip(got, base, strict=True))
        encoded = model.get_encoder()(**fed)
        assert encoded.last_hidden_state.shape[1] == 8 + len(WORDS)
        once = model(**fed, decoder_input_ids=start).logits
        mask = fed["attention_mask"]
        assert torch.equal(model(encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=start).logits, once)
        again = model.generate(encoder_outputs=encoded, attention_mask=mask, **ways[1])
        assert torch.equal(again, got[1])


@torch.no_grad()
def test_copies_have_rows_of_their_own() -> None:
    model = build("bert")
    insertion = prompted("bert", model)
    fed = batch(model)
    want = first(model, fed)
    copied = copy.deepcopy(model)
    assert torch.equal(first(copied, fed), want)
    copied.soft.weight.zero_()
    assert torch.equal(first(model, fed), want)
    assert not torch.equal(first(copied, fed), want)
    insertion.enabled = False
    assert not torch.equal(first(copied, fed), first(model, fed))


@torch.no_grad()
def test_hooks_go_as_they_came() -> None:
    model = build("t5")
    fed = batch(model)
    base = first(model, fed)
    stores = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks")
    insertion = prompted("t5", model)
    insertion.install(model)  # again, as after loading
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == 2
    insertion.remove(model)
    assert not any(getattr(module, store) for module in model.modules() for store in stores)
    assert torch.equal(first(model, fed), base)


@torch.no_grad()
def test_a_call_that_fails_leaves_nothing_behind() -> None:
    model = build("bert")
    insertion = prompted("bert", model)
    fed = batch(model)
    want = first(model, fed)
    with pytest.raises(IndexError):
        model(torch.full((2, 8), 999))
    assert insertion.call is None
    assert torch.equal(first(model, fed), want)


def test_a_study_does_not_see_the_rows() -> None:
    model = build("bert")
    prompted("bert", model)
    again = surgery.study(model)
    assert (again.parts, again.stacks) == (anatomy("bert").parts, anatomy("bert").stacks)
