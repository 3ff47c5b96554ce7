"""What a program requires of its result is checked: when it is planned, before it is kept, and of what was saved."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import surgery
from surgery.errors import PlanError, PromiseError, SurgeryError
from surgery.graph.perplexity import perplexity
from tests import zoo


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Sequences of different lengths: each token counts once, not each sequence."""
    path = tmp_path / "held-out.jsonl"
    lines = [{"input_ids": zoo.tokens(50, 1, length, seed=length)[0].tolist()} for length in (5, 17, 9)]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def by_hand(model: Any, path: Path) -> float:
    losses = []
    with torch.no_grad():
        for line in path.read_text().splitlines():
            ids = torch.tensor(json.loads(line)["input_ids"])
            logits = model(input_ids=ids[None]).logits[0]
            losses += [float(F.cross_entropy(logits[i - 1], ids[i])) for i in range(1, len(ids))]
    return math.exp(sum(losses) / len(losses))


def state(model: Any) -> dict[str, Any]:
    return {
        "bits": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "wanted": {name: tensor.requires_grad for name, tensor in model.named_parameters()},
        "ids": {name: id(tensor) for name, tensor in model.named_parameters()},
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "config": model.config.to_dict(),
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    bits = one["bits"].keys() == other["bits"].keys() and all(
        torch.equal(one["bits"][name], other["bits"][name]) for name in one["bits"]
    )
    return bits and all(one[key] == other[key] for key in ("wanted", "ids", "modules", "config"))


@pytest.mark.parametrize(
    ("program", "found"),
    [
        ("lora rank 8 on all linear ; require trainable < 1%", "trainable < 1%"),
        ("lora rank 8 on all linear ; require trainable <= 10", "trainable <= 10"),
        ("require size < 1 kB", "size < 1 kB"),
        ("quantize ffn nf4 ; require size < 10% of base", "of base"),
        ("prune magnitude 50% on ffn ; require zeros < 50% on ffn", "found 50%"),
        ("prune magnitude 2:4 on ffn.up ; require zeros <= 49% on ffn.up", "found 50%"),
    ],
)
def test_what_shapes_tell_is_refused_by_the_plan(program: str, found: str) -> None:
    model = zoo.tiny("llama")
    before = state(model)
    with pytest.raises(PromiseError) as caught:
        surgery.plan(surgery.parse(program), model)
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == "S502"
    assert diagnostic.span is not None
    assert diagnostic.span.text.startswith("require")
    assert found in str(caught.value)
    assert "FAILS" in diagnostic.help
    assert same(state(model), before)


def test_the_table_has_what_holds_beside_what_fails() -> None:
    program = surgery.parse(
        "lora rank 2 on attn.q ; require size < 1 GB ; require trainable < 0.1% ; require size < 1 kB"
    )
    with pytest.raises(PromiseError) as caught:
        surgery.plan(program, zoo.tiny("llama"))
    assert len(caught.value.diagnostics) == 2, "each that fails has its place"
    rows = [line.split()[-1] for line in caught.value.diagnostics[-1].help.splitlines()[2:]]
    assert sorted(rows) == ["FAILS", "FAILS", "ok"]


def test_counts_are_those_of_the_model() -> None:
    """The bound is met by exactly what there is, and missed by one less."""
    model = surgery.apply(surgery.parse("lora rank 2 on attn.q"), zoo.tiny("qwen2"))
    trained = sum(tensor.numel() for tensor in surgery.parameters(model).values())
    held = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values()
    size = sum(tensor.numel() * tensor.element_size() for tensor in held)
    for verb, count, unit in (("trainable", trained, ""), ("size", size / 1000, " kB")):
        program = f"lora rank 2 on attn.q ; require {verb} {{}} {count}{unit}"
        surgery.plan(surgery.parse(program.format("==")), zoo.tiny("qwen2"))
        with pytest.raises(PromiseError):
            surgery.plan(surgery.parse(program.format("<")), zoo.tiny("qwen2"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_zeros_are_counted_on_the_result_where_the_program_does_not_decide_them(family: str) -> None:
    """`global` spreads them as the weights say; fused and transposed weights count their own rows alone."""
    model = zoo.tiny(family)
    done = surgery.apply(surgery.parse("prune magnitude 40% global on attn.q,k"), zoo.tiny(family))
    parts = [part for part in surgery.study(model).parts if part.role == "attn.q"]
    zeros = size = 0
    for part in parts:
        weight = done.get_submodule(part.path).get_parameter(part.parameter).detach()
        rows = weight.t() if part.transposed else weight
        rows = rows if part.channels is None else torch.cat([rows[a:b] for a, b in part.channels])
        zeros, size = zeros + int((rows == 0).sum()), size + rows.numel()
    program = f"prune magnitude 40% global on attn.q,k ; require zeros {{}} {zeros / size:.17%} on attn.q"
    plan = surgery.plan(surgery.parse(program.format("<=")), zoo.tiny(family))
    assert "checked on the result" in str(plan)
    before = state(model)
    with pytest.raises(PromiseError) as caught:
        surgery.apply(surgery.parse("prune magnitude 40% global on attn.q,k ; require zeros >= 90% on attn.q"), model)
    assert f"{zeros / size:.3%}"[:-2] in str(caught.value)
    assert same(state(model), before), "it is as it was, to the bit"
    surgery.apply(
        surgery.parse(f"prune magnitude 40% global on attn.q,k ; require zeros >= {zeros / size - 0.01:.3%} on attn.q"),
        model,
    )
    assert surgery.verify(model).of("required")[0].status == "holds"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_perplexity_is_e_to_the_mean_loss_of_every_next_token(family: str, texts: Path) -> None:
    model = zoo.tiny(family)
    lines = [torch.tensor([json.loads(line)["input_ids"]]) for line in texts.read_text().splitlines()]
    assert perplexity(model, lines) == pytest.approx(by_hand(model, texts), rel=1e-5)


def test_a_result_that_forgets_is_not_handed_over(texts: Path) -> None:
    """Pruned to nothing it is worse than its base; the model is then as it was, and takes another program."""
    model = zoo.tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # a model that is sure, and wrong, gets better by forgetting
    before, base = state(model), by_hand(model, texts)
    program = (
        'prune magnitude 90% on all linear ; quantize ffn nf4 ; require perplexity {} {} of base using "'
        + str(texts)
        + '"'
    )
    with torch.no_grad():
        free = surgery.apply(surgery.parse("prune magnitude 90% on all linear ; quantize ffn nf4"), _like(model))
    ratio = by_hand(free, texts) / base
    with pytest.raises(PromiseError) as caught:
        surgery.apply(surgery.parse(program.format("<=", ratio * 0.99)), model)
    assert f"{ratio:.3g}"[:3] in str(caught.value)
    assert same(state(model), before)
    surgery.apply(surgery.parse(program.format("<=", ratio * 1.01)), model)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), free.state_dict().values(), strict=True))
    (step,) = [step for step in model.__dict__["_surgery"].plan.steps if step.operation.verb == "require perplexity"]
    assert step.operation.base == pytest.approx(base, rel=1e-5)


def _like(model: Any) -> Any:
    copied = zoo.tiny("llama")
    copied.load_state_dict(model.state_dict())
    return copied


def test_a_saved_result_is_held_to_it_against_the_base_that_was(texts: Path, tmp_path: Path) -> None:
    program = (
        f'prune magnitude 50% on ffn ; require perplexity <= 3 of base using "{texts}" ; require zeros >= 50% on ffn'
    )
    model = surgery.apply(surgery.parse(program), zoo.tiny("llama"))
    surgery.save(model, tmp_path / "out")
    loaded = surgery.load(tmp_path / "out")
    findings = {finding.statement.split()[1]: finding for finding in surgery.verify(loaded).of("required")}
    assert {finding.status for finding in findings.values()} == {"holds"}
    assert "of base" in findings["perplexity"].note
    with torch.no_grad():
        loaded.model.layers[0].mlp.up_proj.weight.fill_(1e-3)
        loaded.lm_head.weight.normal_(std=9, generator=torch.Generator().manual_seed(1))
    broken = {
        finding.statement.split()[1] for finding in surgery.verify(loaded).failures if finding.promise == "required"
    }
    assert broken == {"perplexity", "zeros"}


def test_a_second_program_is_held_to_the_first_one_and_leaves_it_when_it_fails(texts: Path) -> None:
    first = surgery.parse("lora rank 2 on attn.q ; require trainable < 5%")
    model = surgery.apply(first, zoo.tiny("llama"))
    with torch.no_grad():
        model.get_parameter("model.layers.0.self_attn.q_proj.lora_B").fill_(0.1)
    before = state(model)
    with pytest.raises(PromiseError, match="trainable < 5%"):
        surgery.apply(surgery.parse("train ffn"), model)
    for second in ("quantize ffn nf4", "prune magnitude 50% on ffn"):
        with pytest.raises(PromiseError, match="zeros > 99%"):
            surgery.apply(surgery.parse(f"{second} ; require zeros > 99% on ffn"), model)
        assert same(state(model), before), second
    with pytest.raises(PlanError) as caught:
        surgery.apply(surgery.parse(f'train norm ; require perplexity < 2 of base using "{texts}"'), model)
    assert caught.value.diagnostics[0].code == "S140"
    surgery.apply(surgery.parse("quantize ffn nf4 ; require zeros >= 0% on ffn"), model)
    assert surgery.verify(model)
    assert (model.get_parameter("model.layers.0.self_attn.q_proj.lora_B") == 0.1).all()


def test_a_model_that_was_reshaped_is_put_back(texts: Path) -> None:
    model = zoo.tiny("llama")
    before = state(model)
    program = "drop layers 0 ; prune magnitude 90% on ffn ; prune neurons 50% on ffn ; require zeros > 99% on ffn"
    with pytest.raises(PromiseError):
        surgery.apply(surgery.parse(program), model)
    assert same(state(model), before)


@pytest.mark.parametrize(
    ("family", "program", "code"),
    [
        ("bert", 'require perplexity < 9 using "{}"', "S141"),
        ("t5", 'require perplexity < 9 using "{}"', "S141"),
        ("llama", 'require perplexity < 9 using "{}x"', "S130"),
        ("llama", "require size < 1 GB on ffn", "S121"),
        ("llama", "require zeros > 1% on norm", "S207"),
    ],
)
def test_what_makes_no_sense_has_a_place(family: str, program: str, code: str, texts: Path) -> None:
    model = zoo.tiny(family)
    before = state(model)
    with pytest.raises(SurgeryError) as caught:
        surgery.apply(surgery.parse("train norm ; " + program.format(texts)), model)
    assert caught.value.diagnostics[0].code == code, str(caught.value)
    assert caught.value.diagnostics[0].span is not None
    assert same(state(model), before)


def test_an_encoder_has_no_perplexity() -> None:
    with pytest.raises(PlanError, match="sees the token"):
        perplexity(zoo.tiny("bert"), [zoo.tokens(50, 1, 9)])
