"""Defects that peers are known for: of prefixes, of prompts and of what goes with them (9 to 12)."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import surgery
from surgery.verify.bounds import relative_error
from tests import others, zoo
from tests.conformance.defects import trained
from tests.texts import CACHES, in_front


def test_defect_09_a_lora_and_a_prefix_train_and_are_saved_together(tmp_path: Path) -> None:
    model = trained(zoo.tiny("llama"), "lora rank 2 on attn.q; prefix 3 on all layers")
    fed = zoo.inputs(model)
    model.train()(**fed).logits.square().mean().backward()
    added = surgery.parameters(model)
    assert {name.rpartition(".")[2] for name in added} == {"lora_A", "lora_B", "prefix_key", "prefix_value"}
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in added.values())
    surgery.save(model.eval(), tmp_path / "out")
    assert torch.equal(zoo.logits(surgery.load(tmp_path / "out"), fed), zoo.logits(model, fed))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gptj"])
def test_defect_10_a_prefix_keeps_under_gradient_checkpointing(family: str) -> None:
    """A prefix that is handed in as a cache is dropped where layers are checkpointed; here gradients keep their bits.

    Caches with checkpointing are refused by PEFT itself; GPT-J is reached through its cache here too, and may.
    """
    gradients = []
    for checkpointing in (False, True):
        model = others.tiny(family) if family == "gptj" else zoo.tiny(family)
        surgery.apply(surgery.parse("prefix 5"), model)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        fed = zoo.inputs(model)
        model(**fed, labels=fed["input_ids"], use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in surgery.parameters(model).values()])
    assert all(grad is not None and grad.abs().sum() > 0 for grad in gradients[0])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_defect_10_checkpointing_is_what_a_peer_refuses() -> None:
    """The defect is there: PEFT's prefix tuning will not be built on a model with gradient checkpointing."""
    peft = pytest.importorskip("peft")
    model = zoo.tiny("llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with pytest.raises(ValueError, match="gradient checkpointing"):
        peft.get_peft_model(model, peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"))


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gptj"])
def test_defect_10_a_prefix_generates_with_every_cache(family: str, cache: str) -> None:
    """A prefix that lies in the cache takes its places: static ones fail. Here a cache holds tokens only."""
    base = others.tiny(family) if family == "gptj" else zoo.tiny(family)
    base.generation_config.eos_token_id = None
    model = copy.deepcopy(base)
    surgery.apply(surgery.parse(f'prefix init text "{others.TEXT}"'), model, tokenizer=others.ids_of)
    x = zoo.tokens(50, 2, 6)
    prompt = in_front(x)
    wanted = base.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
    got = model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=6, do_sample=False, **CACHES[cache])
    assert got[:, 6:].tolist() == wanted[:, prompt.shape[1] :].tolist()
    plain = base.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=6, do_sample=False)
    assert got.tolist() != plain.tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt", "phi3"])
@pytest.mark.parametrize("method", ["prefix 3 on all layers", "prompt 4 init vocab", "ptuning v1 4 via mlp 8"])
def test_defect_11_the_amount_of_padding_changes_no_logit_and_none_is_added(family: str, method: str) -> None:
    model = trained(zoo.tiny(family), method, size=1.0)
    fed = zoo.inputs(model)
    plain = zoo.logits(model, fed)
    assert plain.shape[:2] == fed["input_ids"].shape
    with surgery.disabled(model):
        assert relative_error(zoo.logits(model, fed), plain) > 0.02
    for padding in (1, 5):
        ids = F.pad(fed["input_ids"], (padding, 0), value=7)
        mask = F.pad(torch.ones_like(fed["input_ids"]), (padding, 0))
        padded = zoo.logits(model, {"input_ids": ids, "attention_mask": mask})
        assert relative_error(padded[:, padding:], plain) < 2e-6


@pytest.mark.parametrize("via", ["mlp 8", "lstm 8"])
def test_defect_12_the_network_behind_a_prompt_is_saved_so_that_training_goes_on(via: str, tmp_path: Path) -> None:
    model = trained(zoo.tiny("llama"), f"ptuning v1 4 via {via}")
    surgery.save(model, tmp_path / "out")
    again = surgery.load(tmp_path / "out")
    ours, theirs = surgery.parameters(model), surgery.parameters(again)
    assert len(ours) > 4, "the network's own tensors"
    assert ours.keys() == theirs.keys()
    fed = zoo.inputs(model)
    for each in (model, again):
        optimizer = torch.optim.SGD(surgery.parameters(each).values(), lr=0.1)
        each(**fed).logits.square().mean().backward()
        optimizer.step()
    before = surgery.parameters(surgery.load(tmp_path / "out"))
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name])
        assert not torch.equal(tensor, before[name]), f"{name} was not trained"
