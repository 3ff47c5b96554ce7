"""Cuts of neurons and heads that are refused or planned: shares, words, shapes that nothing can take, and why."""

from __future__ import annotations

import copy
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn

import surgery
from surgery.errors import GraphError, PlanError, ProgramError
from tests import zoo
from tests.operations.cut import TOKENS, decoder


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        ("prune heads 30% on attn", "S160", "50% (1 stay)"),
        ("prune neurons 30% round to 16 on ffn", "S160", "33.33% (32 stay)"),
        ("prune neurons 99.9% on ffn", "S161", "without neurons"),
        ("prune neurons 10% round to 64 on ffn", "S161", "fewer than 64"),
        ("prune heads 90% on attn", "S161", "without heads"),
        ("prune neurons 30% on attn", "S162", "the selector finds none"),
        ("prune neurons 30% on ffn ; prune neurons 20% by random on ffn", "S103", "both take its neurons"),
    ],
)
def test_shares_that_cannot_be_had_say_what_can(program: str, code: str, said: str) -> None:
    model = decoder()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(PlanError) as caught:
        surgery.apply(surgery.parse(program), model, example_inputs=(TOKENS,))
    assert caught.value.diagnostics[0].code == code
    assert said in str(caught.value)
    assert caught.value.diagnostics[0].span is not None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("program", "width"),
    [
        ("prune neurons 30% round to 16 nearest on ffn", 32),
        ("prune neurons 20% round to 16 nearest on ffn", 32),
        ("prune neurons 99% nearest on ffn", 1),
        ("prune neurons 0% on ffn", 48),
    ],
)
def test_the_nearest_share_is_taken_when_asked_for(program: str, width: int) -> None:
    assert [layer.ffn.up.out_features for layer in decoder(program).layers] == [width, width]


def test_a_word_too_many_or_wrong_is_told_where_it_stands() -> None:
    for program, said in [
        ("prune neuron 30% on ffn", "did you mean 'neurons'?"),
        ("prune neurons 30% by magnitud on ffn", "did you mean 'magnitude'?"),
        ("prune neurons 30% by sensitivity on ffn", "needs texts"),
        ("prune neurons 30% global on ffn", "unknown option 'global' for prune neurons"),
        ("prune heads 2:4 on attn", "cannot be 2:4"),
    ]:
        with pytest.raises(ProgramError) as caught:
            surgery.parse(program)
        assert said in str(caught.value), str(caught.value)


def test_a_forward_that_works_out_sizes_by_itself_is_refused() -> None:
    specimen = zoo.specimen("byhand")
    with pytest.raises(PlanError) as caught:
        surgery.plan(surgery.parse("prune heads 34% nearest on attn"), specimen.model, example_inputs=specimen.example)
    assert caught.value.diagnostics[0].code == "S332"


def test_experts_have_no_neurons_in_common() -> None:
    with pytest.raises(PlanError) as caught:
        surgery.plan(surgery.parse("prune neurons 50% on ffn + experts"), zoo.tiny("mixtral"))
    assert caught.value.diagnostics[0].code == "S162"


def test_a_shared_table_needs_all_layers_that_read_it() -> None:
    with pytest.raises(PlanError, match="share a tensor"):
        surgery.plan(surgery.parse("prune heads 50% on attn in decoder layers 0"), zoo.tiny("t5"))


class Slopes(nn.Module):
    """Attention whose heads differ by a number made of how many there are: no row holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.each = 4, 4
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (way(x).view(*x.shape[:2], self.heads, self.each).transpose(1, 2) for way in (self.q, self.k, self.v))
        slopes = torch.arange(1, self.heads + 1, dtype=x.dtype, device=x.device) / self.heads
        scores = (q @ k.transpose(-1, -2)) * slopes[:, None, None]
        out: Tensor = self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(*x.shape[:2], -1))
        return x + out


class SlopesModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(61, 16)
        self.layers = nn.ModuleList(Slopes() for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return x


def test_what_no_tensor_holds_is_found_by_running_both_and_nothing_is_changed() -> None:
    model = SlopesModel().double()
    zoo.fill(model, 0)
    before, modules = copy.deepcopy(model.state_dict()), [vars(module).copy() for module in model.modules()]
    with pytest.raises(GraphError) as caught:
        surgery.apply(surgery.parse("prune heads 50% on attn"), model, example_inputs=(TOKENS,))
    assert caught.value.diagnostics[0].code == "S332"
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [layer.heads for layer in model.layers] == [4, 4]
    assert len(modules) == len(list(model.modules()))


def test_a_wrong_row_breaks_the_promise() -> None:
    """verify compares numbers: a row put back in another place is found."""
    model = decoder("prune heads 50% on attn")
    assert surgery.verify(model, example_inputs=(TOKENS,))
    attention = model.layers[0].attention  # narrower heads, as many as there were: it runs, and is another function
    attention.heads, attention.key_value_heads, attention.head_width = 4, 2, 4
    model.rotary.head_width = 4
    model.layers[1].attention.heads, model.layers[1].attention.key_value_heads = 4, 2
    model.layers[1].attention.head_width = 4
    report = surgery.verify(model, example_inputs=(TOKENS,))
    assert any(finding.promise == "shrunk_equals_masked" for finding in report.failures)


def test_planning_reads_shapes_alone() -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(zoo.config("llama", num_hidden_layers=2))
    plan = surgery.plan(surgery.parse("prune heads 50% on attn ; prune neurons 30% on ffn ; lora rank 2 on ffn"), model)
    told = str(plan)
    assert "4 -> 2 heads" in told
    assert "37 -> 26 neurons" in told
    assert plan.cost.bytes_after < plan.cost.bytes_before
    assert model.model.layers[0].mlp.up_proj.weight.shape == (37, 24)


SIZES_BY_LAYER = Version("5.14")
"""The first transformers whose configurations hold sizes by layer."""


@pytest.mark.skipif(
    Version(version("transformers")) < SIZES_BY_LAYER,
    reason=f"transformers before {SIZES_BY_LAYER} reads no `per_layer_config`",
)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "phi3"])
def test_no_family_here_builds_sizes_that_differ_by_layer(family: str) -> None:
    """Why such a model is built by `surgery.load`: when this fails, its configuration can say it after all."""
    assert zoo.config(family, per_layer_config={1: {"intermediate_size": 20}}).is_heterogeneous
    with torch.device("meta"), pytest.raises(RuntimeError, match="per-layer attribute"):
        zoo.tiny(family, per_layer_config={1: {"intermediate_size": 20}})
