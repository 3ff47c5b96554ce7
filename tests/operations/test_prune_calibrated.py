"""Pruning by what a model does with texts: the papers' formulas written out, exact counts, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import surgery
from surgery.errors import SurgeryError
from surgery.operations.prune_scores import reconstructed
from tests import zoo


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Six sequences of seventeen tokens."""
    path = tmp_path / "texts.jsonl"
    lines = [{"input_ids": zoo.tokens(50, 1, 17, seed=seed)[0].tolist()} for seed in range(6)]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def sequences(path: Path) -> list[Tensor]:
    return [torch.tensor([json.loads(line)["input_ids"]]) for line in path.read_text().splitlines()]


def inputs_of(model: Any, path: str, texts: Path) -> Tensor:
    """What a map reads of all the texts, (tokens, in)."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for ids in sequences(texts):
            model(input_ids=ids)
    handle.remove()
    return torch.cat(seen)


def smallest(score: Tensor, count: int) -> Tensor:
    zero = torch.zeros(score.numel(), dtype=torch.bool)
    zero[torch.sort(score.flatten(), stable=True).indices[:count]] = True
    return zero.view_as(score)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt"])
def test_wanda_is_the_papers_from_layer_to_layer(family: str, texts: Path) -> None:
    """|w| times the norm of its input, within each row, inputs being those of the model pruned so far."""
    program = surgery.parse(f'prune wanda 40% using "{texts}" on ffn.up')
    model = surgery.apply(program, zoo.tiny(family))
    plain = zoo.tiny(family)
    parts = [part for part in surgery.study(plain).parts if part.role == "ffn.up"]
    assert len(parts) == 3
    for part in parts:
        weight = plain.get_submodule(part.path).weight
        score = weight.abs() * inputs_of(plain, part.path, texts).norm(dim=0)
        cut = torch.stack([smallest(row, round(0.4 * len(row))) for row in score.detach()])
        weight.data[cut] = 0
        assert torch.equal(model.get_submodule(part.path).weight, weight), part.path
    assert surgery.verify(model)


@pytest.mark.parametrize("scope", ["", " global", " rows"])
def test_sensitivity_is_the_mean_of_gradient_times_weight(scope: str, texts: Path) -> None:
    program = surgery.parse(f'prune sensitivity 30%{scope} using "{texts}" samples 4 on attn.q + ffn.down')
    model = surgery.apply(program, zoo.tiny("qwen2"))
    plain = zoo.tiny("qwen2")
    paths = [part.path for part in surgery.study(plain).parts if part.role in ("attn.q", "ffn.down")]
    scores = {path: torch.zeros_like(plain.get_submodule(path).weight) for path in paths}
    for ids in sequences(texts)[:4]:
        plain.zero_grad()
        plain(input_ids=ids, labels=ids).loss.backward()
        for path, score in scores.items():
            weight = plain.get_submodule(path).weight
            score += (weight.grad * weight).abs().detach() / 4
    if scope == " global":
        flat = torch.cat([score.flatten() for score in scores.values()])
        cuts = smallest(flat, round(0.3 * len(flat))).split([score.numel() for score in scores.values()])
    elif scope == " rows":
        cuts = tuple(torch.stack([smallest(row, round(0.3 * len(row))) for row in score]) for score in scores.values())
    else:
        cuts = tuple(smallest(score, round(0.3 * score.numel())) for score in scores.values())
    for path, cut in zip(paths, cuts, strict=True):
        found = model.get_submodule(path).weight == 0
        assert (found.flatten() != cut.flatten()).sum() <= 2, "but for ties within rounding"
        assert found.any()
    assert surgery.verify(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("group", [0, 4])
def test_sparsegpt_makes_up_for_what_goes(group: int) -> None:
    """The column by column solution of the paper, without blocks; nearer to the outputs than any mask alone."""
    made = torch.Generator().manual_seed(0)
    mixing = torch.randn(24, 24, generator=made, dtype=torch.float64)
    x = torch.randn(300, 24, generator=made, dtype=torch.float64) @ mixing
    weight = torch.randn(10, 24, generator=made, dtype=torch.float64)
    hessian = x.t() @ x / len(x)

    def keep_in(score: Tensor, first: int, last: int) -> Tensor:
        rank = score.argsort(1).argsort(1) if group else score.flatten().argsort().argsort().view_as(score)
        return rank >= (group // 2 if group else score.numel() // 2)

    keep, found = reconstructed(weight, hessian, keep_in, group)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    w, wanted = weight.clone(), torch.ones(10, 24, dtype=torch.bool)
    inverse = torch.linalg.inv(damped)
    diagonals = []
    for j in range(24):  # the inverse without the columns before, one elimination at a time
        diagonals.append(torch.linalg.inv(damped[j:, j:])[0, 0])
    for j in range(24):
        if j == 0 or (group and j % group == 0):
            until = j + group if group else 24
            wanted[:, j:until] = keep_in(w[:, j:until].square() / torch.stack(diagonals[j:until]), j, until)
        inverse = torch.linalg.inv(damped[j:, j:])
        error = w[:, j].masked_fill(wanted[:, j], 0) / inverse[0, 0]
        w[:, j:] -= error.unsqueeze(1) * inverse[0]
    assert torch.equal(keep, wanted)
    torch.testing.assert_close(found, w.masked_fill(~wanted, 0), rtol=1e-8, atol=1e-8)
    alone = (x @ (weight * keep - weight).t()).norm()
    assert (x @ (found - weight).t()).norm() < 0.9 * alone


@pytest.mark.parametrize(
    "family",
    ["llama", "gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("phi3", "t5", "bert", "gemma"))],
)
@pytest.mark.parametrize("score", ["wanda", "sparsegpt", "sensitivity"])
def test_every_family_keeps_the_promises(family: str, score: str, texts: Path, tmp_path: Path) -> None:
    """Fused projections, Conv1D, encoders, decoders; exact counts, saved and loaded, and codes of what stays."""
    program = f'prune {score} 50% using "{texts}" on attn.q + ffn; quantize ffn.down nf4; lora rank 2 on attn.q'
    model = surgery.apply(surgery.parse(program), zoo.tiny(family))
    assert surgery.verify(model)
    fed = zoo.inputs(model)
    assert not torch.equal(zoo.logits(model, fed), zoo.logits(zoo.tiny(family), fed))
    surgery.save(model, tmp_path / "out")
    assert torch.equal(zoo.logits(surgery.load(tmp_path / "out"), fed), zoo.logits(model, fed))


def test_texts_are_read_through_the_tokenizer(tmp_path: Path) -> None:
    """A text file, JSONL of texts and JSONL of the same ids prune alike; a plain module too."""
    words = [f"w{3 + (7 * i) % 40}" for i in range(60)]
    (tmp_path / "a.txt").write_text(" ".join(words))
    pieces = [words[start : start + 20] for start in range(0, 60, 20)]
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": " ".join(piece)}) for piece in pieces))
    ids = [[int(word[1:]) for word in piece] for piece in pieces]
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"input_ids": each}) for each in ids))
    found = []
    for file in ("a.txt", "b.jsonl", "c.jsonl"):
        model = zoo.plain("byhand")
        program = surgery.parse(f'prune wanda 50% using "{tmp_path / file}" length 20 on ffn')
        tokenizer = None if file == "c.jsonl" else zoo.tokenizer(51)
        surgery.apply(program, model, example_inputs=(zoo.tokens(51),), tokenizer=tokenizer)
        found.append(model.blocks[2].drop.weight)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert int((found[0] == 0).sum()) == found[0].shape[0] * round(0.5 * found[0].shape[1])


def test_pruning_by_what_matters_hurts_less(texts: Path) -> None:
    """Of the same share: SparseGPT's output is nearer to the model's than magnitude's."""
    fed = {"input_ids": torch.cat(sequences(texts))}
    base = zoo.logits(zoo.tiny("llama"), fed)
    apart = {}
    for score in ("magnitude", "sparsegpt"):
        using = f' using "{texts}"' if score == "sparsegpt" else ""
        model = surgery.apply(surgery.parse(f"prune {score} 50%{using} on ffn"), zoo.tiny("llama"))
        apart[score] = F.mse_loss(zoo.logits(model, fed), base).item()
    assert 0 < apart["sparsegpt"] < apart["magnitude"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot read"),
        ("", "no sequence"),
        ('{"input_ids": [5]}\n', "no sequence"),
        ('{"input_ids": [5, 7]}\n{"texts": "a"}\n', "texts.jsonl:2"),
        ('{"input_ids": [5, 7]\n', "texts.jsonl:1"),
        ('{"input_ids": [5, 700]}\n', "token 700"),
    ],
)
def test_a_calibration_set_that_cannot_be_used_is_refused(content: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    if content is not None:
        path.write_text(content)
    model = zoo.tiny("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(SurgeryError, match=said) as caught:
        surgery.apply(
            surgery.parse(f'prune wanda 50% using "{path}" on ffn'),
            model,
            tokenizer=zoo.tokenizer(model.config.vocab_size),
        )
    assert caught.value.diagnostics[0].code == "S130"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_loss_that_is_no_number_is_refused(texts: Path) -> None:
    model = zoo.tiny("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(SurgeryError, match="nan") as caught:
        surgery.apply(surgery.parse(f'prune sensitivity 50% using "{texts}" on ffn'), model)
    assert caught.value.diagnostics[0].code == "S398"


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("prune wanda 50% on ffn", "needs texts"),
        ('prune magnitude 50% using "x.txt" on ffn', "reads no texts"),
        ('prune wanda 50% global using "x.txt" on ffn', "different matrices"),
        ('prune sparsegpt 50% rows using "x.txt" on ffn', "no meaning"),
        ("prune magnitude 3:2 on ffn", "3:2"),
    ],
)
def test_options_that_exclude_each_other_are_refused(program: str, said: str) -> None:
    with pytest.raises(SurgeryError, match=said):
        surgery.parse(program)
