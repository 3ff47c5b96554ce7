"""Adapters to PEFT and back: PEFT's own loader reads what we write, and what it writes becomes a program of ours."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from surgery.errors import CheckpointError
from surgery.verify.bounds import relative_error
from tests import zoo
from tests.cli.conftest import Run as Run
from tests.cli.conftest import run as run
from tests.conformance.peers import linear_maps, peft_lora

PROGRAMS = [
    ("llama", "lora rank 2 alpha 3 on attn.q,v + ffn.down; lora rank 3 on ffn.up"),
    ("qwen2", "lora rank 2 dora on all linear"),
    ("gpt2", "lora rank 2 on attn.q,v; lora rank 3 alpha 5 scale rs on attn.o"),
    ("phi3", "lora rank 2 dora on attn.q,v"),
    ("gpt_neox", "lora rank 3 on attn.q,v + embed"),
    ("t5", "lora rank 2 on cross.q + attn.v in decoder"),
    ("bert", "ia3 on attn.k,v + ffn.down"),
    ("gpt2", "ia3 on attn.k,v + ffn.down"),
    ("llama", "prefix 4 on all layers"),
    ("gpt2", "prefix 4 on all layers"),
]


def trained(family: str, program: str, **changes: Any) -> Any:
    model = surgery.apply(surgery.parse(program), zoo.tiny(family, **changes))
    with torch.no_grad():
        for name, parameter in surgery.parameters(model).items():
            drawn = torch.randn(parameter.shape, generator=zoo.seeded(1, name), dtype=torch.float64)
            parameter.add_(0.3 * parameter.shape[-1] ** -0.5 * drawn)
    return model


def in_peft(family: str, path: Path) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(zoo.tiny(family), path).eval()


def answer(model: Any, fed: Any) -> torch.Tensor:
    with torch.no_grad():
        result = model(**fed)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


@pytest.mark.parametrize(("family", "program"), PROGRAMS)
def test_peft_computes_what_we_do(family: str, program: str, tmp_path: Path) -> None:
    model = trained(family, program)
    fed = zoo.inputs(model)
    surgery.export(model, tmp_path / "out", to="peft")
    assert relative_error(answer(model, fed), answer(zoo.tiny(family), fed)) > 0.02
    assert relative_error(answer(in_peft(family, tmp_path / "out"), fed), answer(model, fed)) < 2e-6


def test_every_named_adapter_has_a_folder(tmp_path: Path) -> None:
    model = trained("llama", "quantize attn.o nf4; lora rank 2 on attn.q; lora rank 3 on attn.q,v as french")
    surgery.export(model, tmp_path / "out", to="peft", origin="here")
    ranks = [
        json.loads((tmp_path / "out" / folder / "adapter_config.json").read_text())["r"] for folder in (".", "french")
    ]
    assert ranks == [2, 3]
    surgery.activate(model, "french")
    alone = trained("llama", "lora rank 3 on attn.q,v as french")
    fed = zoo.inputs(model)
    assert relative_error(answer(in_peft("llama", tmp_path / "out" / "french"), fed), answer(alone, fed)) < 2e-6


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("lora rank 2 on attn.q; prefix 3 on all layers", "one adapter"),
        ("lora rank 2 on attn.q; prune magnitude 50% on ffn", "changes the base"),
        ("prefix 3 gated on all layers", "no format"),
        ("prefix 3 on layers 1", "every layer"),
        ("lora rank 2 dora on attn.q; lora rank 2 on attn.v", "DoRA"),
        ("quantize base nf4", "no adapter"),
    ],
)
def test_what_the_format_cannot_say_is_refused(program: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=said) as caught:
        surgery.export(trained("llama", program), tmp_path / "out", to="peft")
    assert caught.value.diagnostics[0].code == "S451"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert"])
@pytest.mark.parametrize("option", [{}, {"rs": True}, {"dora": True}])
def test_what_peft_writes_is_read(family: str, option: dict[str, bool], tmp_path: Path) -> None:
    base = zoo.tiny(family)
    theirs = peft_lora(base, linear_maps(base), rank=3, alpha=5, **option)
    from peft import LoraConfig, PeftModel

    transposed = family == "gpt2"
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=linear_maps(base),
        use_rslora=bool(option.get("rs")),
        use_dora=bool(option.get("dora")),
        fan_in_fan_out=transposed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = PeftModel(zoo.tiny(family), config)
        with torch.no_grad():
            for name, tensor in whole.named_parameters():
                path, _, kind = name.removeprefix("base_model.model.").rpartition(".lora_")
                if path:
                    tensor.copy_(theirs.tensors[f"{path}.lora_{kind.partition('.')[0].removesuffix('_vector')}"])
        whole.eval().save_pretrained(tmp_path / "theirs")
    model = surgery.import_peft(tmp_path / "theirs", base)
    fed = zoo.inputs(model)
    assert relative_error(answer(model, fed), answer(zoo.tiny(family), fed)) > 0.02
    assert relative_error(answer(model, fed), answer(whole, fed)) < 4e-6
    (statement,) = model._surgery.plan.program.statements
    assert "*" in str(statement), "layers share a glob"


def test_there_and_back_is_the_same_adapter(tmp_path: Path) -> None:
    model = trained("llama", "lora rank 2 alpha 3 on attn.q,v + ffn.down; lora rank 3 on ffn.up")
    surgery.export(model, tmp_path / "out", to="peft")
    again = surgery.import_peft(tmp_path / "out", zoo.tiny("llama"))
    ours, theirs = surgery.parameters(model), surgery.parameters(again)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "LOHA"}, "only LORA"),
        ({"modules_to_save": ["classifier"]}, "modules_to_save"),
        ({"r": 5}, "rank 2"),
    ],
)
def test_what_we_cannot_say_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    surgery.export(trained("llama", "lora rank 2 on attn.q"), tmp_path / "out", to="peft")
    path = tmp_path / "out" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    model = zoo.tiny("llama")
    before = dict(model.named_parameters())
    with pytest.raises(CheckpointError, match=said) as caught:
        surgery.import_peft(tmp_path / "out", model)
    assert caught.value.diagnostics[0].code == "S452"
    assert dict(model.named_parameters()).keys() == before.keys()


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    surgery.export(trained("llama", "lora rank 2 on attn.q"), tmp_path / "out", to="peft")
    with pytest.raises(CheckpointError, match="no module"):
        surgery.import_peft(tmp_path / "out", zoo.tiny("gpt2"))


def test_the_commands_go_there_and_back(tmp_path: Path, run: Run) -> None:
    zoo.tiny("llama").save_pretrained(tmp_path / "base")
    (tmp_path / "p.surgery").write_text("lora rank 2 on attn.q,v\n")
    assert run("apply", "p.surgery", "base", "-o", "out").status == 0
    assert run("export", "out", "--to", "peft", "-o", "adapter").status == 0
    assert run("import", "adapter", "--from", "peft", "--base", "base", "-o", "again").status == 0
    assert run("verify", "again").status == 0
    assert run("diff", "out", "again").status == 0
    assert run("export", "out", "--to", "huggingface", "-o", "whole").status == 0
    from transformers import AutoModelForCausalLM

    fed = zoo.inputs(zoo.tiny("llama"))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    assert relative_error(answer(whole, fed), answer(surgery.load(tmp_path / "out"), fed)) < 1e-6
    refused = run("export", "out", "--to", "peft", "-o", "adapter")
    assert refused.status == 2
    assert "S430" in refused.err
