"""Adapters to PEFT and back: what we write, PEFT loads and computes the same; what PEFT then writes, we load."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import surgery
from surgery.verify.bounds import relative_error
from tests import studied, zoo
from tests.cli.conftest import Run as Run
from tests.cli.conftest import run as run

FAMILIES = ("llama", "gpt2", "gpt_neox", "phi3", "bert", "t5")
METHODS = {
    "lora": "lora rank 2 alpha 3 on attn.q,v + ffn.down; lora rank 3 alpha 5 scale rs on attn.o + embed",
    "dora": "lora rank 2 dora on attn.k + ffn",
    "ia3": "ia3",
    "prompt": "prompt 4 init normal",
    "p-tuning mlp": "ptuning v1 4 via mlp 7",
    "p-tuning lstm": "ptuning v1 3 via lstm 5",
    "prefix": "prefix 4 on all layers{where}",
    "prefix mlp": "prefix 3 via mlp 7 on all layers{where}",
}
QUICK = (
    *(("llama", method) for method in METHODS),
    *((family, "lora") for family in ("gpt2", "gpt_neox", "phi3", "bert")),
    *(("bert", "ia3"), ("gpt2", "prefix mlp"), ("phi3", "dora"), ("gpt_neox", "p-tuning mlp"), ("t5", "prefix")),
)
PAIRS = [
    pytest.param(family, method, marks=() if (family, method) in QUICK else pytest.mark.slow, id=f"{family}-{method}")
    for family in FAMILIES
    for method in METHODS
]
SINGLE = [
    ("qwen2", "lora rank 2 on attn.q; train bias in layers 1"),
    ("gpt2", 'lora rank 2 on attn.q,v; train bias in "transformer.h.*.attn.c_attn"'),
    ("llama", "lora rank 2 scale rs on all linear; train add on bias in attn.q"),
    ("llama", "lora rank 2 on attn.q; train norm, head"),
    ("llama", "prompt 3 init normal; train head"),
    ("bert", "ia3 input on attn.o"),
    ("gpt2", "ptuning v2 3"),
    ("t5", "lora rank 2 on cross.q + attn.v in decoder"),
    ("mixtral", "lora rank 2 on experts; lora rank 3 dropout 0% on attn.q"),
    ("mixtral", "lora rank 2 on ffn.up; lora rank 3 alpha 1 on ffn.gate"),
    ("qwen2_moe", 'lora rank 2 on "**.experts.down_proj"'),
    ("gpt_oss", 'lora rank 2 scale rs on ffn.up + router; lora rank 1 on "**.down_proj"'),
]


def trained(family: str, program: str) -> Any:
    """A base under a program, whatever it trains moved away from its start."""
    model = studied.apply(program, family, zoo.tiny(family))
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


def kept_by_peft(model: Any, path: Path) -> Path:
    """Where PEFT has saved a model's adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(path, save_embedding_layers=False)
    return path


def answer(model: Any, fed: Any) -> Tensor:
    with torch.no_grad():
        result = model(**fed)
    found: Tensor = result.logits if hasattr(result, "logits") else result.last_hidden_state
    return found[:, -fed.get("decoder_input_ids", fed["input_ids"]).shape[1] :]  # PEFT answers for its rows too


def there_and_back(family: str, program: str, tmp_path: Path) -> Any:
    """Ours to PEFT, PEFT's own copy to ours: equal logits and equal tensors; gives PEFT's model."""
    model = trained(family, program)
    fed = zoo.inputs(model)
    ours = answer(model, fed)
    assert relative_error(answer(zoo.tiny(family), fed), ours) > 0.02
    surgery.export(model, tmp_path / "out", to="peft")
    theirs = in_peft(family, tmp_path / "out")
    assert relative_error(answer(theirs, fed), ours) < 2e-6
    copy = kept_by_peft(theirs, tmp_path / "theirs")
    written, kept = (load_file(each / "adapter_model.safetensors") for each in (tmp_path / "out", copy))
    assert written.keys() == kept.keys(), "PEFT loads what it finds and says nothing of the rest"
    assert all(torch.equal(written[name], kept[name]) for name in kept)
    again = surgery.import_peft(copy, zoo.tiny(family))
    assert relative_error(answer(again, fed), ours) < 2e-6
    return again


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_every_method_there_and_back(family: str, method: str, tmp_path: Path) -> None:
    where = " in decoder" if family == "t5" else ""
    again = there_and_back(family, METHODS[method].format(where=where), tmp_path)
    if method != "prompt":
        texts = [str(statement) for statement in again._surgery.plan.program.statements]
        assert all(len(text) < 400 for text in texts), "layers share a pattern"


@pytest.mark.parametrize(("family", "program"), SINGLE)
def test_what_else_the_format_can_say(family: str, program: str, tmp_path: Path) -> None:
    there_and_back(family, program, tmp_path)


def test_every_named_adapter_has_a_folder(tmp_path: Path) -> None:
    model = trained("llama", "quantize attn.o nf4; lora rank 2 on attn.q; prefix 3 on all layers as french")
    surgery.export(model, tmp_path / "out", to="peft", origin="here")
    kinds = [
        json.loads((tmp_path / "out" / folder / "adapter_config.json").read_text())["peft_type"]
        for folder in (".", "french")
    ]
    assert kinds == ["LORA", "PREFIX_TUNING"]
    alone = trained("llama", "prefix 3 on all layers as french")
    fed = zoo.inputs(model)
    assert relative_error(answer(in_peft("llama", tmp_path / "out" / "french"), fed), answer(alone, fed)) < 2e-6
    both = surgery.import_peft(tmp_path / "out", zoo.tiny("llama"))
    both = surgery.import_peft(tmp_path / "out" / "french", both, name="french")
    assert set(surgery.active(both)) == {"default", "french"}
    surgery.activate(both, "french")
    assert relative_error(answer(both, fed), answer(alone, fed)) < 2e-6


def test_there_and_back_is_the_same_adapter(tmp_path: Path) -> None:
    model = trained("llama", METHODS["lora"])
    surgery.export(model, tmp_path / "out", to="peft")
    again = surgery.import_peft(tmp_path / "out", zoo.tiny("llama"))
    ours, theirs = surgery.parameters(model), surgery.parameters(again)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_prompt_of_a_model_with_two_stacks_may_have_rows_that_nobody_reads(tmp_path: Path) -> None:
    """PEFT makes twice as many rows by default, and puts the first half in front of the encoder."""
    from peft import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM", prompt_tuning_init="RANDOM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(zoo.tiny("t5"), config).eval()
    assert theirs.prompt_encoder["default"].embedding.weight.shape[0] == 6
    again = surgery.import_peft(kept_by_peft(theirs, tmp_path / "theirs"), zoo.tiny("t5"))
    fed = zoo.inputs(zoo.tiny("t5"))
    assert relative_error(answer(again, fed), answer(theirs, fed)) < 2e-6
    assert relative_error(answer(zoo.tiny("t5"), fed), answer(theirs, fed)) > 0.01


def test_a_prefix_as_peft_makes_it_for_two_stacks(tmp_path: Path) -> None:
    """PEFT's own table has one pair for each layer, and reads every other one, over and over."""
    from peft import PrefixTuningConfig, get_peft_model

    config = PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM")
    base = zoo.tiny("t5", num_layers=4, num_decoder_layers=4, d_model=20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(base, config).eval()
    fed = zoo.inputs(base)
    wanted = answer(theirs, fed)
    again = surgery.import_peft(kept_by_peft(theirs, tmp_path / "theirs"), theirs.get_base_model())
    assert relative_error(answer(again, fed), wanted) < 2e-6


@pytest.mark.parametrize("method", ["LoraConfig", "IA3Config"])
@pytest.mark.parametrize(
    "family", ["bert", *(pytest.param(family, marks=pytest.mark.slow) for family in ("llama", "gpt2", "t5"))]
)
def test_what_peft_makes_by_its_own_table_is_read(family: str, method: str, tmp_path: Path) -> None:
    """Its default targets, its own names and all its fields; bert's IA3 scales an input of attention."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(zoo.tiny(family), getattr(peft, method)()).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                drawn = torch.randn(parameter.shape, generator=zoo.seeded(2, name), dtype=torch.float64)
                parameter.add_(0.2 * drawn)
    again = surgery.import_peft(kept_by_peft(theirs, tmp_path / "theirs"), zoo.tiny(family))
    fed = zoo.inputs(zoo.tiny(family))
    assert relative_error(answer(again, fed), answer(theirs, fed)) < 2e-6
    assert relative_error(answer(zoo.tiny(family), fed), answer(theirs, fed)) > 0.02


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
