"""What a plan refuses it refuses once, at the statement, with a way out that leads out; and what it counts is so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from surgery.errors import Diagnostic, SurgeryError
from surgery.language.pairs import statements as forms
from surgery.language.program import Program
from surgery.operations import TABLE
from tests import studied, zoo


def refusal(program: str, model: Any, **given: Any) -> Diagnostic:
    """The only one; the model is as it was."""
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(SurgeryError) as raised:
        surgery.plan(surgery.parse(program), model, **given)
    with pytest.raises(SurgeryError) as applied:
        surgery.apply(surgery.parse(program), model, **given)
    assert str(applied.value) == str(raised.value)
    assert [name for name, _ in model.named_modules()] == before
    (found,) = raised.value.diagnostics
    return found


@pytest.mark.parametrize(
    ("program", "code", "said", "label"),
    [
        ("ia3; optimize adamw8bit paged strict lr 1e-3", "S116", "is strict", ""),
        ('ia3; instruct "w5 w6"', "S347", "no tokenizer to count them", ""),
        ('ia3; prefix init text "w5 w6"', "S347", "no tokenizer to count them", ""),
        ("prefix 2; lora rank 2 init loftq on all linear", "S380", "layers.0.self_attn.q_proj", "21 such places"),
        ("prefix 2; lora rank 2 init loftq on attn.q", "S380", "layers.0.self_attn.q_proj", "3 such places"),
        ("prefix 2; lora rank 2 init loftq on attn.q in layers 1", "S380", "layers.1.self_attn.q_proj", ""),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_refused_is_said_once_where_it_is_written(
    device: str, program: str, code: str, said: str, label: str
) -> None:
    """Promise: on shapes as with weights; how many places there are is told, not each of them."""
    found = refusal(program, zoo.tiny("llama").to(device))
    assert found.code == code
    assert said in found.message
    assert found.label == label
    assert found.span is not None
    assert found.span.text == program.partition("; ")[2]


def test_another_number_of_tokens() -> None:
    """Promise: both numbers; the right one, as a plan that was written down has it, is taken."""
    model = zoo.tiny("llama")
    tokenizer = zoo.tokenizer(model.config.vocab_size)
    found = refusal('instruct "w5 w6 w7" tokens 9', model, tokenizer=tokenizer)
    assert (found.code, found.message) == ("S124", "`instruct` says `tokens 9`, and its text has 3")
    assert found.span is not None
    planned = surgery.plan(surgery.parse('instruct "w5 w6 w7" tokens 9'), model)
    with pytest.raises(SurgeryError, match="S124") as raised:
        surgery.apply(planned, model, tokenizer=tokenizer)
    assert raised.value.diagnostics[0].span is not None
    assert torch.equal(zoo.logits(model, zoo.inputs(model)), zoo.logits(zoo.tiny("llama"), zoo.inputs(model)))
    surgery.apply(surgery.parse('instruct "w5 w6 w7" tokens 3'), model, tokenizer=tokenizer)
    assert not torch.equal(zoo.logits(model, zoo.inputs(model)), zoo.logits(zoo.tiny("llama"), zoo.inputs(model)))


@pytest.mark.parametrize(
    ("program", "helps"),
    [
        ("lora rank 2 on attn.q; lora rank 3 on attn.q", "as NAME"),
        ("lora rank 2 init pissa on attn.q as one; lora rank 2 init pissa on attn.q as two", "`except`"),
        ("lora rank 2 init pissa on attn.q; lora rank 2 init pissa on attn.q", "`except`"),
        ("lora rank 2 init pissa on attn.q; lora rank 3 on attn.q", "as NAME"),
        ("lora rank 2 dora on attn.q; lora rank 2 init pissa on attn.q as two", "`except`"),
        ("prompt 2; prompt 3", "as NAME"),
        ("adapter bottleneck 2 after ffn as a; adapter bottleneck 3 after ffn as b", "then second"),
        ("optimize sgd lr 1; optimize sgd lr 2; ia3", "keep one"),
    ],
)
def test_a_way_out_of_a_conflict_leads_out(program: str, helps: str) -> None:
    """Promise: a name is proposed where a name helps, and only there."""
    found = refusal(program, zoo.tiny("llama"))
    assert found.code == "S103"
    assert helps in found.help
    first, _, second = program.partition("; ")
    if helps == "as NAME":
        surgery.plan(surgery.parse(f"{first}; {second} as other"), zoo.tiny("llama"))


@pytest.mark.parametrize(("via", "other"), [("mlp 7", "prefix 5 via mlp 7"), ("lstm 7", "prefix 5 via mlp 512")])
def test_what_v2_cannot_do_is_written_as_a_prefix(via: str, other: str) -> None:
    with pytest.raises(SurgeryError, match="S017") as raised:
        surgery.parse(f"ptuning v2 5 via {via}")
    assert f"`{other}`" in raised.value.diagnostics[0].help
    assert str(surgery.parse(other).statements[0].operation) in f"{other}"


def test_what_stays_in_a_merge_is_not_said_to_fold() -> None:
    """A router with a forward of its own: the plan's line, its warning and the merged model say the same."""
    model = zoo.tiny("mixtral")
    plan = surgery.plan(surgery.parse("lora rank 2 on router\nlora rank 2 on attn.q"), model)
    lines = str(plan).splitlines()
    router, query = (next(i for i, line in enumerate(lines) if line.strip() == f"lora rank 2 on {role}")
                     for role in ("router", "attn.q"))  # fmt: skip
    assert lines[router + 2].endswith("merge: not everywhere, see the warning")
    assert lines[query + 2].endswith("merge: folds into the weight")
    assert any("`lora rank 2 on router` cannot merge" in line for line in lines)
    assert str(type(plan).from_json(plan.to_json())) == str(plan)
    merged = surgery.merge(surgery.apply(plan, model))
    left = [name for name, module in merged.named_modules() if type(module).__name__ == "Rewritten"]
    assert left
    assert all("mlp.gate" in name for name in left)


def test_every_statement_that_stays_is_told() -> None:
    model = zoo.tiny("mixtral")
    plan = surgery.plan(surgery.parse("lora rank 2 on router as one\nlora rank 3 on router as two"), model)
    told = [line for line in plan.warnings if "cannot merge" in line]
    assert [line.partition("` ")[0] for line in told] == [
        "`lora rank 2 on router as one",
        "`lora rank 3 on router as two",
    ]


def test_a_place_that_is_the_model_has_a_name() -> None:
    """Promise: where the model itself is the place, the plan says so and not nothing."""
    model = zoo.specimen("nano").model
    anatomy = studied.anatomy("nano")
    shown = str(surgery.plan(surgery.parse("prompt 3"), model, anatomy=anatomy))
    row = next(line for line in shown.splitlines() if "entry.front" in line)
    assert row.endswith("the model")
    with pytest.raises(SurgeryError, match="both act on the model"):
        surgery.plan(surgery.parse("prompt 3; prompt 4"), model, anatomy=anatomy)


@pytest.mark.parametrize("family", ["llama", "bert", "t5", "gpt2"])
def test_every_method_trains_as_many_as_planned(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise: the share that a plan prints is what is counted after `apply`."""
    monkeypatch.chdir(tmp_path)
    Path("examples.jsonl").write_text('{"input": "w5", "output": "w6"}\n')
    tokenizer = zoo.tokenizer(zoo.tiny(family).config.vocab_size)
    done = set()
    methods = [form for form in forms(TABLE) if form.operation.phase != "require"]
    for form in methods:
        model = zoo.tiny(family)
        try:
            plan = surgery.plan(Program((form,)), model, tokenizer=tokenizer)
        except SurgeryError:
            continue
        surgery.apply(plan, model, tokenizer=tokenizer)
        tensors = {id(each): each for each in model.parameters()}.values()
        trained = sum(each.numel() for each in tensors if each.requires_grad)
        total = plan.cost.parameters + sum(plan.cost.added)
        if form.operation.verb == "sparse":  # of its weights those count that the mask keeps
            assert 0 < plan.cost.trainable < trained
            continue
        assert plan.cost.trainable == trained, str(form)
        assert f"Trainable  {trained:,} of {total:,} parameters ({trained / total:.3%})" in str(plan), str(form)
        done.add(form.operation.verb)
        if form.operation.phase == "attach" and form.operation.verb not in ("instruct", "shots"):
            assert trained, str(form)
    assert len(done) >= len({form.operation.verb for form in methods}) - 6
