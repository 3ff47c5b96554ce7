"""Mistakes that somebody could make with rows in front of tokens, each noticed by a test of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import surgery
from surgery.errors import SurgeryError
from surgery.graph import insertion, insertion_entrance, insertion_layout
from surgery.graph.insertion import Insertion, Reader
from surgery.graph.insertion_entrance import Entrance
from surgery.graph.insertion_layout import Layout
from tests import zoo
from tests.graph import test_insertion as inputs
from tests.graph import test_insertion_outputs as outputs
from tests.graph import test_insertion_plain as plain
from tests.graph import test_insertion_training as training

Patch = pytest.MonkeyPatch


def _in_front_of_the_padding(patch: Patch) -> None:
    patch.setattr(Layout, "behind", classmethod(lambda cls, n, length, mask, padding=False: cls(n, length)))


def _unseen(patch: Patch) -> None:
    def mask(self: Layout, given: Tensor, padding: bool = False) -> Tensor:
        return self.put(given.new_zeros((len(given), self.n)), given)

    patch.setattr(Layout, "mask", mask)


def _rows_see_padding(patch: Patch) -> None:
    original = Layout.mask

    def mask(self: Layout, given: Tensor, padding: bool = False) -> Tensor:
        wide = original(self, given, padding)
        if given.dim() > 2 and given.dtype == torch.bool:
            wide[..., : self.n, :] = True
        return wide

    patch.setattr(Layout, "mask", mask)


def _positions_not_shifted(patch: Patch) -> None:
    patch.setattr(Layout, "positions", lambda self, given: self.put(torch.arange(self.n)[None], given))


def _type_one(patch: Patch) -> None:
    patch.setattr(Layout, "beside", lambda self, given: self.put(given.new_ones((1, self.n)), given))


def _cut_at_the_end(patch: Patch) -> None:
    patch.setattr(Layout, "cut", lambda self, values: values[:, : -self.n])


def _backwards(patch: Patch) -> None:
    original = Layout.replace
    patch.setattr(Layout, "replace", lambda self, rows, values: original(self, rows.flip(1), values))


def _padding_as_placeholder(patch: Patch) -> None:
    patch.setattr(insertion_entrance, "ordinary", lambda model, part: model.config.pad_token_id or 0)


def _the_decoder_s_mask_stays(patch: Patch) -> None:
    patch.setattr(Reader, "__call__", lambda self, module, args, kwargs: None)


def _left_in_the_encoder(patch: Patch) -> None:
    original = Entrance.find.__func__  # type: ignore[attr-defined]

    def find(cls: Any, *args: Any) -> Entrance:
        import dataclasses

        return dataclasses.replace(original(cls, *args), keeps=False, readers=())

    patch.setattr(Entrance, "find", classmethod(find))


def _forgotten_by_checkpoints(patch: Patch) -> None:
    def layout(self: Insertion, arguments: Any) -> Any:
        return None if self.call is None else self.call.layout

    patch.setattr(Insertion, "_layout", layout)


def _padding_masks_as_others(patch: Patch) -> None:
    for module in (insertion, insertion_layout):
        patch.setattr(module, "marks_padding", lambda name: False)


def _detached(patch: Patch) -> None:
    original = Layout.replace
    patch.setattr(Layout, "replace", lambda self, rows, values: original(self, rows.detach(), values))


def _hidden_states_stay_long(patch: Patch) -> None:
    patch.setattr(Layout, "cut_nested", lambda self, output: output)


def _room_counts_what_is_free(patch: Patch) -> None:
    patch.setattr(insertion_entrance, "_room", lambda *args: 40)


def test_soft_is_hard() -> None:
    model = zoo.tiny("bert")
    tokenizer = zoo.tokenizer(58)
    surgery.apply(surgery.parse('prompt init text "w7 w20"'), model, tokenizer=tokenizer)
    (finding,) = surgery.verify(model, tokenizer=tokenizer).of("soft_equals_hard")
    assert finding.status == "holds"


def same(name: str, padding: str = "left") -> Callable[[], None]:
    return lambda: inputs.test_rows_are_what_words_are(name, padding)


BUGS: dict[str, tuple[Callable[[Patch], None], Callable[[], None]]] = {
    "rows in front of the padding": (_in_front_of_the_padding, same("bert")),
    "rows that no token attends to": (_unseen, same("t5")),
    "rows that attend to padding": (_rows_see_padding, inputs.test_masks_of_every_form),
    "positions not shifted": (
        _positions_not_shifted,
        lambda: inputs.test_positions_and_token_types_of_the_caller("left"),
    ),
    "a token type of their own": (_type_one, lambda: inputs.test_positions_and_token_types_of_the_caller("none")),
    "the last places cut": (_cut_at_the_end, same("distilbert", "none")),
    "rows backwards": (_backwards, test_soft_is_hard),
    "padding as placeholder": (_padding_as_placeholder, same("roberta")),
    "a decoder's mask as it was": (_the_decoder_s_mask_stays, same("bart")),
    "rows cut before a decoder attends": (_left_in_the_encoder, same("t5")),
    "layers that run again uncut": (
        _forgotten_by_checkpoints,
        lambda: plain.test_a_checkpoint_around_the_last_layer(False),
    ),
    "padding masks taken for others": (_padding_masks_as_others, plain.test_torch_s_own_encoder_and_its_padding_mask),
    "no gradient": (_detached, lambda: training.test_gradients_reach_the_rows("albert")),
    "hidden states longer": (_hidden_states_stay_long, lambda: outputs.test_hidden_states_keep_the_length("bert")),
    "free rows counted as room": (_room_counts_what_is_free, inputs.test_no_room_for_positions),
}


@pytest.mark.parametrize("what", BUGS)
def test_a_planted_bug_is_noticed(what: str, monkeypatch: Patch) -> None:
    plant, check = BUGS[what]
    plant(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, AttributeError, IndexError, SurgeryError)):
        check()
