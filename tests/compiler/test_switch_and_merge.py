"""Adapters by name, the base to the bit, and what a merge gives back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import surgery
from surgery.errors import GraphError
from surgery.graph.module import Rewritten
from surgery.verify.bounds import merge_bound, relative_error
from tests import zoo
from tests.properties.case import bits, same

FAMILIES = ("llama", "qwen2", "gemma", "phi3", "gpt2", "gpt_neox", "opt", "bert", "t5")


def trained(family: str, program: str, **changes: Any) -> Any:
    model = surgery.apply(surgery.parse(program), zoo.tiny(family, **changes))
    generator = torch.Generator().manual_seed(5)
    for parameter in surgery.parameters(model).values():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def test_names_choose_adapters() -> None:
    """off_means_off: one adapter at a time, several, none; unknown names are refused."""
    model = trained("llama", "lora rank 2 on attn.q as one\nlora rank 3 on attn.q,v as two")
    fed = zoo.inputs(model)
    both = zoo.logits(model, fed)
    surgery.activate(model, "one")
    first = zoo.logits(model, fed)
    surgery.activate(model, "two")
    second = zoo.logits(model, fed)
    surgery.activate(model, "one", "two")
    assert torch.equal(zoo.logits(model, fed), both)
    base = zoo.logits(zoo.tiny("llama"), fed)
    seen = (base, both, first, second)
    assert not any(torch.equal(one, other) for i, one in enumerate(seen) for other in seen[:i])
    with surgery.disabled(model):
        assert torch.equal(zoo.logits(model, fed), base)
    assert torch.equal(zoo.logits(model, fed), both)
    with pytest.raises(GraphError, match="has: one, two"):
        surgery.activate(model, "three")


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_models_are_plain(family: str, tmp_path: Path) -> None:
    """merges: same logits within rounding, nothing of ours left in the model, and its files load as any others."""
    model = trained(family, "lora rank 2 on all linear + embed")
    fed = zoo.inputs(model)
    wanted, classes = zoo.logits(model, fed), {name: type(m) for name, m in zoo.tiny(family).named_modules()}
    assert surgery.merge(model) is model
    found = zoo.logits(model, fed)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (wanted - zoo.logits(zoo.tiny(family), fed)).abs().max() > 1e-3
    assert {name: type(m) for name, m in model.named_modules()} == classes
    assert model.state_dict().keys() >= zoo.tiny(family).state_dict().keys()
    with pytest.raises(GraphError, match="not transformed"):
        surgery.merge(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(zoo.logits(again, fed), found)


@pytest.mark.parametrize("family", ["qwen2", "gemma", "gpt2"])
def test_tied_tensors_are_untied_by_a_merge(family: str) -> None:
    """frame: merging into a tied head leaves the embedding as it was, and the config says that they differ now."""
    changes = {"tie_word_embeddings": True}
    model = trained(family, "lora rank 2 on head", **changes)
    before = model.get_input_embeddings().weight.detach().clone()
    fed = zoo.inputs(model)
    wanted = zoo.logits(model, fed)
    surgery.merge(model)
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert not torch.equal(model.get_output_embeddings().weight, before)
    assert model.config.tie_word_embeddings is False
    assert (zoo.logits(model, fed) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_merge_of_one_tied_place_keeps_the_other_ties() -> None:
    """frame: what is not touched stays tied."""
    model = trained("qwen2", "lora rank 2 on attn.q", tie_word_embeddings=True)
    surgery.merge(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.tie_word_embeddings is True


def test_sixteen_bit_merges_round_once() -> None:
    """merges: a delta far below one rounding step of most weights still moves the ones it should (sums are float32)."""
    model = zoo.tiny("llama", dtype=torch.bfloat16)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    surgery.apply(surgery.parse("lora rank 2 on ffn.down"), model)
    added = surgery.parameters(model)
    assert {parameter.dtype for parameter in added.values()} == {torch.float32}
    for name, parameter in added.items():
        parameter.data.normal_(
            std=0.01 if name.endswith("B") else 0.3, generator=torch.Generator().manual_seed(len(name))
        )
    deltas = {
        name[: -len("lora_A")] + "weight": added[name[: -len("A")] + "B"].detach() @ tensor.detach()
        for name, tensor in added.items()
        if name.endswith("lora_A")
    }
    surgery.merge(model)
    for name, delta in deltas.items():
        wanted = (base[name].float() + delta).to(torch.bfloat16)
        assert torch.equal(model.get_parameter(name), wanted)
        assert not torch.equal(wanted, base[name])


@pytest.mark.parametrize("family", ["gpt2", "phi3", "gpt_neox"])
def test_rows_of_k_keep_their_bits_through_a_merge(family: str) -> None:
    """frame: `lora on attn.q,v` on a fused projection never touches k."""
    anatomy = surgery.study(zoo.tiny(family))
    keys = [part for part in anatomy.parts if part.role == "attn.k"]
    model = surgery.merge(trained(family, "lora rank 2 on attn.q,v"))
    base = zoo.tiny(family)
    assert len(keys) == 3
    for part in keys:
        assert part.channels is not None
        rows = torch.cat([torch.arange(*run) for run in part.channels])
        after, before = (m.get_submodule(part.path).weight.detach() for m in (model, base))
        after, before = (after.t(), before.t()) if part.transposed else (after, before)
        assert torch.equal(after[rows], before[rows])
        assert not torch.equal(after, before)


def test_parameters_are_what_was_added() -> None:
    """frame: only the program's own tensors want gradients, and they get some."""
    model = trained("t5", "lora rank 2 on attn.q + cross.v")
    model(**zoo.inputs(model)).logits.square().mean().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert with_gradient == set(surgery.parameters(model))
    assert len(with_gradient) == 2 * sum(isinstance(m, Rewritten) for m in model.modules())


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_adapters_over_a_trained_base_merge_into_what_it_has_become(family: str, tmp_path: Path) -> None:
    """merges, off_means_off, round_trip: both are stepped together; the sum is of the base as it is then."""
    start = zoo.tiny(family).state_dict()
    model = surgery.apply(surgery.parse("train ffn\nlora rank 2 alpha 6 on ffn"), zoo.tiny(family))
    first, fed = bits(model), zoo.inputs(model)
    optimizer = torch.optim.AdamW(surgery.parameters(model).values(), lr=0.02)
    for _ in range(3):
        model(**fed).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    held, wanted = bits(model), zoo.logits(model, fed)
    assert not [name for name in surgery.parameters(model) if torch.equal(held[name], first[name])]

    plain = zoo.tiny(family)
    plain.load_state_dict({name: held[name] for name in start})
    with surgery.disabled(model):
        assert torch.equal(zoo.logits(model, fed), zoo.logits(plain, fed))
    surgery.save(model, tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    moved = {name for name in start if not torch.equal(held[name], start[name])}
    assert moved == set(surgery.parameters(model)) & start.keys()
    assert all(torch.equal(saved[name], held[name]) for name in moved)
    loaded = surgery.load(tmp_path / "out")
    assert same(bits(loaded), held)

    surgery.merge(model, keep=True)
    after, largest, maps = bits(model), 0.0, {name[: -len("lora_A")] for name in held if name.endswith("lora_A")}
    assert after.keys() == start.keys()
    assert {f"{path}weight" for path in maps} == {name for name in moved if held[name].dim() > 1}
    for path in maps:
        weight = held.pop(f"{path}weight").double()
        branch = 3 * held[f"{path}lora_B"].double() @ held[f"{path}lora_A"].double()
        branch = branch.t() if family == "gpt2" else branch  # whose maps are stored (in, out)
        assert relative_error(after[f"{path}weight"], weight + branch) <= merge_bound(torch.float32)
        factors = held[f"{path}lora_B"].norm() * held[f"{path}lora_A"].norm()
        largest = max(largest, 3 * float(factors / weight.norm()))
    assert all(torch.equal(tensor, held[name]) for name, tensor in after.items() if name in held), (
        "biases, and the rest"
    )
    bound = merge_bound(torch.float32, len(maps), largest)
    assert bound < 0.01
    assert relative_error(zoo.logits(model, fed), wanted) <= bound
    assert relative_error(zoo.logits(plain, fed), wanted) > 10 * bound
    assert same(bits(surgery.merge(loaded)), after)
    loaded.save_pretrained(tmp_path / "merged")
    assert same(bits(type(loaded).from_pretrained(tmp_path / "merged")), after)
    surgery.unmerge(model)
    assert torch.equal(zoo.logits(model, fed), wanted)
