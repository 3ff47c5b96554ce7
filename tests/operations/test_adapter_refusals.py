"""Adapters that cannot be: in a row, as a statement, where no module gives the output, where it is no tensor."""

from __future__ import annotations

import pytest
import torch

import surgery
from surgery.errors import GraphError, PlanError, ProgramError
from tests import zoo


@pytest.mark.parametrize(
    ("text", "code", "named"),
    [
        ("adapter bottleneck 4 after ffn\nadapter bottleneck 5 beside ffn", "S103", "bottleneck 4"),
        ("adapter bottleneck 4 after ffn as a\nadapter bottleneck 5 after ffn as b", "S103", "bottleneck 4"),
        ("adapter bottleneck 4 after ffn then c as a\nadapter bottleneck 5 after ffn then c as b\n"
         "adapter bottleneck 6 after ffn as c", "S103", "bottleneck 4"),
        ("adapter bottleneck 4 after ffn then b as a\nadapter bottleneck 5 after ffn as a", "S103", "bottleneck 4"),
        ("adapter bottleneck 4 after attn + ffn then b as a\nadapter bottleneck 5 after ffn as b", "S110", "no such"),
        ("adapter bottleneck 4 after ffn then b as a\nadapter bottleneck 5 after ffn then a as b", "S110", "and after"),
    ],
)  # fmt: skip
def test_what_cannot_stand_in_a_row(text: str, code: str, named: str) -> None:
    model = zoo.tiny("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(PlanError) as refused:
        surgery.apply(surgery.parse(text), model)
    assert {each.code for each in refused.value.diagnostics} == {code}
    assert named in str(refused.value)
    assert all(each.span is not None for each in refused.value.diagnostics)
    assert before.keys() == model.state_dict().keys()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("adapter bottleneck 4 rellu after ffn", "S011", "did you mean 'relu'"),
        ("adapter bottleneck 4 relu gelu after ffn", "S016", "besides"),
        ("adapter bottleneck 4", "S018", "`after` or `beside`"),
        ("adapter bottleneck 4 on ffn", "S018", "write `after ffn`"),
        ("adapter bottleneck 4 after ffn on attn", "S007", "twice"),
        ("adapter bottleneck 4 after ffn beside attn", "S017", "two statements"),
        ("adapter bottleneck 0 after ffn", "S013", "at least 1"),
        ("adapter after ffn", "S015", "bottleneck"),
        ("adapter bottleneck 4 after fnn", "S020", "ffn"),
        ("adapter bottleneck 4 after ffn scale leaned", "S012", "learned"),
        ("adapter bottleneck 4 after ffn scale 0", "S017", "no adapter at all"),
        ("adapter bottleneck 4 after ffn scale learned 0", "S017", "no adapter at all"),
        ("adapter bottleneck 4 after ffn dropout 100%", "S013", "less than 100%"),
    ],
)
def test_what_is_not_understood(text: str, code: str, says: str) -> None:
    with pytest.raises(ProgramError) as refused:
        surgery.parse(text)
    assert code in {each.code for each in refused.value.diagnostics}
    assert says in str(refused.value)


@pytest.mark.parametrize("where", ["after ffn", "beside ffn"])
def test_a_feed_forward_without_any_module(where: str) -> None:
    from tests.anatomy.test_edges import Bare, Stack

    ids = torch.arange(6).view(2, 3)
    with pytest.raises(PlanError, match="no module gives its output") as refused:
        surgery.apply(surgery.parse(f"adapter bottleneck 4 {where}"), Stack(Bare), example_inputs=(ids,))
    assert {each.code for each in refused.value.diagnostics} == {"S101"}


def test_an_edge_that_is_no_tensor() -> None:
    """A module that gives something else at run time than when it was studied says so, and does not go on."""
    model = zoo.plain("nano", depth=1)
    surgery.apply(surgery.parse("adapter bottleneck 4 after ffn"), model, example_inputs=(zoo.tokens(51),))
    model.blocks[0].narrow.register_forward_hook(lambda module, args, output: {"y": output}, prepend=True)
    with pytest.raises(GraphError, match="gives a dict") as refused:
        model(zoo.tokens(51))
    assert refused.value.diagnostics[0].code == "S360"
