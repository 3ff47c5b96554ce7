"""Where queries stand, read from masks alone; and planted mistakes that the tests of prefixes must see."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import surgery
import surgery.graph.attention
import surgery.graph.attention_cache
import surgery.graph.attention_places
from surgery.errors import SurgeryError
from surgery.graph.attention_count import calls
from surgery.graph.attention_places import places, prefixed_call_mask, table_of_distances
from tests import others
from tests.graph import test_attention_cache as by_cache
from tests.operations import test_prefix_pairs as pairs
from tests.operations import test_prefix_windows as windows

Q, K = torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 5, 4)


def test_places_without_a_mask() -> None:
    """Several queries are the first ones, a single one is the last."""
    assert places(None, Q, Q, True).tolist() == [[0, 1, 2]]
    assert places(None, Q[:, :, :1], K, True).tolist() == [[4]]


def test_places_do_not_count_padding_nor_room() -> None:
    """Row 0 has two places of padding on the left; the cache has room for more keys than there are."""
    mask = torch.zeros(2, 1, 3, 7, dtype=torch.bool)
    for query in range(3):
        mask[0, 0, query, 2 : 3 + query] = True
        mask[1, 0, query, : 3 + query] = True
    wanted = [[0, 1, 2], [2, 3, 4]]
    assert places(mask, Q, torch.zeros(2, 1, 7, 4), True).tolist() == wanted
    added = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    assert places(added, Q, torch.zeros(2, 1, 7, 4), True).tolist() == wanted


def test_places_where_all_see_all() -> None:
    """In an encoder every query sees the same keys: one stands behind those before it."""
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]], dtype=torch.bool)[:, None, None]
    assert places(mask, Q, Q, False).tolist() == [[-1, 0, 1], [0, 1, 1]]


class Module:
    is_causal = True


@pytest.mark.parametrize("given", [torch.bool, torch.float32, None])
def test_a_window_hides_positions_one_by_one(given: torch.dtype | None) -> None:
    """A window of 4, a prefix of 3: the query at place p sees position j if p + 3 - j < 4, so p of them go."""
    query = key = torch.zeros(1, 1, 3, 4)
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril() if given is not None else None
    if given == torch.float32 and mask is not None:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    for windowed in (True, False):
        got = prefixed_call_mask(mask, Module(), query, key, {"sliding_window": 4}, 3, True, windowed)
        assert got is not None
        seen = (got if got.dtype == torch.bool else got == 0).expand(1, 1, 3, 6)
        hidden = [[1, 1, 1], [0, 1, 1], [0, 0, 1]] if windowed else [[1, 1, 1]] * 3
        assert seen[0, 0, :, :3].int().tolist() == hidden
        assert torch.equal(seen[0, 0, :, 3:], torch.ones(3, 3, dtype=torch.bool).tril())


def test_the_table_of_distances_is_of_the_same_stack() -> None:
    """T5 keeps one in the first layer of each stack, UMT5 in every layer, BERT none."""
    model = others.tiny("t5")
    for stack in ("encoder", "decoder"):
        first = model.get_submodule(f"{stack}.block.0.layer.0.SelfAttention")
        assert table_of_distances(model, f"{stack}.block.1.layer.0.SelfAttention")[0] is first
    each = others.tiny("umt5")
    path = "encoder.block.1.layer.0.SelfAttention"
    assert table_of_distances(each, path)[0] is each.get_submodule(path)
    assert table_of_distances(others.tiny("bart"), "model.encoder.layers.0.self_attn") == ()


@torch.no_grad()
def test_copies_read_their_own_table() -> None:
    """Promise: a copy is independent, the biases that its prefix reads included."""
    model = others.apply("prefix 4", "t5", others.tiny("t5"))
    fed = others.inputs(model)
    on = model(**fed).logits
    copied = copy.deepcopy(model)
    core = copied.decoder.block[1].layer[0].SelfAttention.surgery_attention.core
    assert core.distances[0] is copied.decoder.block[0].layer[0].SelfAttention
    for stack in (copied.encoder, copied.decoder):
        stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight.mul_(2.0)
    assert torch.equal(model(**fed).logits, on)
    assert not torch.allclose(copied(**fed).logits, on, atol=1e-3)


Patch = pytest.MonkeyPatch


def _padding_counted(patch: Patch) -> None:
    def counted(mask: Tensor | None, query: Tensor, key: Tensor, causal: bool) -> Tensor:
        return torch.arange(query.shape[-2])[None] + (key.shape[-2] - query.shape[-2])

    patch.setattr(surgery.graph.attention_places, "places", counted)


def _window_off_by_one(patch: Patch) -> None:
    distances = surgery.graph.attention_places._distances
    patch.setattr(surgery.graph.attention_places, "_distances", lambda *args: distances(*args) - 1)


def _no_bias(patch: Patch) -> None:
    patch.setattr(surgery.graph.attention, "table_of_distances", lambda *_: ())


def _cross_shifts_positions(patch: Patch) -> None:
    original = surgery.graph.attention.AttentionSite._in_front_of_call

    def marked(self: Any, key: Any, value: Any, positions: Any, windowed: bool) -> Any:
        joined = original(self, key, value, positions, windowed)
        joined.meta["positions"] = positions
        return joined

    patch.setattr(surgery.graph.attention.AttentionSite, "_in_front_of_call", marked)


def _prefix_stored(patch: Patch) -> None:
    """The prefix goes into the model's own cache, again at every step."""

    def update(self: Any, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        key, value = self.child(key, value)
        return (key, value) if self.inner is None else self.inner.update(key, value, *args, **kwargs)

    patch.setattr(surgery.graph.attention_cache.Front, "update", update)


def _mask_upside_down(patch: Patch) -> None:
    of = surgery.graph.attention_cache.Fronting.of.__func__  # type: ignore[attr-defined]

    def turned(cls: Any, module: Any) -> Any:
        made = of(cls, module)
        object.__setattr__(made, "hides", not made.hides)
        return made

    patch.setattr(surgery.graph.attention_cache.Fronting, "of", classmethod(turned))


def _slopes_of_one_kind(patch: Patch) -> None:
    powers = surgery.graph.attention_cache._powers
    patch.setattr(surgery.graph.attention_cache, "_powers", lambda heads: powers(heads) * 2)


BUGS: dict[str, tuple[Callable[[Patch], None], Callable[[], None]]] = {
    "padding counted as distance": (
        _padding_counted,
        lambda: pairs.test_text_stands_in_front_of_the_encoders_tokens("t5", "left"),
    ),
    "window off by one": (
        _window_off_by_one,
        lambda: windows.test_text_as_prefix_leaves_the_window_as_a_prompt_does("mistral", 11, "sdpa"),
    ),
    "no bias for the prefix": (
        _no_bias,
        lambda: pairs.test_text_stands_in_front_of_the_decoders_tokens("t5", "none"),
    ),
    "cross-attention shifts positions": (
        _cross_shifts_positions,
        lambda: pairs.test_prefix_on_cross_is_more_encoder_states("bart", "none"),
    ),
    "the prefix is stored in the cache": (
        _prefix_stored,
        lambda: by_cache.test_generate_token_for_token("gptj", "dynamic"),
    ),
    "true is taken for seen where it hides": (
        _mask_upside_down,
        lambda: by_cache.test_text_as_prefix_is_text_as_prompt("mpt"),
    ),
    "slopes of the wrong heads": (
        _slopes_of_one_kind,
        lambda: by_cache.test_text_as_prefix_is_text_as_prompt("bloom"),
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_seen(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each mistake is caught by the test that states its promise."""
    plant, promise = BUGS[bug]
    promise()
    plant(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        promise()


def test_differential_attention_is_refused() -> None:
    """Bad input: two calls with the same keys and other values, of which a prefix would be put in front twice."""
    assert [calls(kind) for kind in (_Twice, _Either, _Returns)] == [2, 1, 1]
    with pytest.raises(SurgeryError, match="S343"):
        surgery.plan(surgery.parse("prefix 4"), others.tiny("diffllama"))


class _Twice:
    def forward(self, interface: Any) -> Any:
        attend: Any = interface.get_interface("")
        return attend(1), attend(2)


class _Either:
    def forward(self, interface: Any) -> Any:
        attend = interface.get_interface("")
        if interface.packed:
            out = attend(1)
        else:
            interface.unpack()
            out = [attend(each) for each in interface.pieces]
        return out


class _Returns:
    def forward(self, interface: Any) -> Any:
        attend = interface.get_interface("")
        if interface.packed:
            return attend(1)
        return attend(2)


@pytest.mark.parametrize(("name", "reason"), [("jamba", "2 of 4 layers have no attention"), ("llama4", "chunks of 4")])
def test_a_text_that_is_no_prompt_is_said_to_be_none(name: str, reason: str) -> None:
    """State-space layers see nothing of a prefix, and chunks are counted without it: the plan says so."""
    changes = {"num_hidden_layers": 4} if name == "jamba" else {}
    model = others.tiny(name, **changes)
    program = surgery.parse(f'prefix init text "{others.TEXT}"')
    plan = surgery.plan(program, model, tokenizer=others.ids_of)
    assert reason in str(plan)
    assert reason not in str(surgery.plan(surgery.parse("prefix 5"), model, anatomy=plan.anatomy))
    surgery.apply(plan, model, tokenizer=others.ids_of)
    report = surgery.verify(model, tokenizer=others.ids_of)
    assert report
    assert all(reason in finding.skipped for finding in report.of("soft_equals_hard"))
    assert "not checked" in str(report)
