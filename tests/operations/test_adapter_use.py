"""Models with adapters are trained, checkpointed, compiled, copied, saved, merged and changed again, and generate."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.graph.edge import Edge
from tests import zoo
from tests.operations.adapters import EVERYWHERE, ROW, apply, trained


def test_gradients_reach_the_adapters_alone() -> None:
    for family in ("opt", "gpt_neox", "t5"):
        specimen = zoo.specimen(family)
        apply(ROW, specimen)
        trained(specimen.model)
        specimen.model.train()
        specimen.model(**specimen.inputs).logits.square().mean().backward()
        wanted = {name for name, p in specimen.model.named_parameters() if p.requires_grad}
        got = {name for name, p in specimen.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert got == wanted == set(surgery.parameters(specimen.model))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_.*is deprecated:FutureWarning")
def test_gradient_checkpointing(family: str, reentrant: bool) -> None:
    """What is kept of a sub-layer's input is kept again when a layer is run again: gradients are the same bits."""
    found = []
    for checkpointed in (False, True):
        specimen = zoo.specimen(family)
        apply(ROW.replace("as b", "dropout 20% as b").replace("norm after", "after"), specimen)
        trained(specimen.model)
        specimen.model.train()
        if checkpointed:
            specimen.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            specimen.model.enable_input_require_grads()
        torch.manual_seed(0)
        specimen.model(**specimen.inputs, use_cache=False).logits.square().mean().backward()
        found.append({name: tensor.grad for name, tensor in surgery.parameters(specimen.model).items()})
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "nano"])
def test_compiled_as_one_graph(family: str) -> None:
    """Also where the model was compiled before anything hung on its edges, and switched off in between."""
    specimen = zoo.specimen(family, dtype=torch.float32)
    compiled = torch.compile(specimen.model, fullgraph=True, backend="aot_eager")

    def run() -> Tensor:
        out = compiled(*specimen.inputs) if specimen.example else compiled(**specimen.inputs, use_cache=False).logits
        assert isinstance(out, Tensor)
        return out

    base = run()
    apply(ROW, specimen)
    trained(specimen.model)
    assert torch.allclose(run(), specimen.logits(), atol=1e-5)
    assert not torch.allclose(run(), base, atol=1e-2)
    with surgery.disabled(specimen.model):
        assert torch.allclose(run(), base, atol=1e-5)


@torch.no_grad()
def test_copies_are_independent() -> None:
    """A copy's branches beside the ffn read the copy's input."""
    specimen = zoo.specimen("opt")
    apply(ROW, specimen)
    trained(specimen.model)
    before = specimen.logits()
    copied = copy.deepcopy(specimen.model)
    trained(copied, 1)
    assert not torch.allclose(zoo.logits(copied, specimen.inputs), before, atol=1e-2)
    assert torch.equal(specimen.logits(), before)
    for one, other in zip(
        surgery.parameters(specimen.model).values(), surgery.parameters(copied).values(), strict=True
    ):
        other.copy_(one)
    assert torch.equal(zoo.logits(copied, specimen.inputs), before)


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(cache: str) -> None:
    """Token by token from a cache, with padding on the left, as without a cache."""
    model = zoo.tiny("llama")
    surgery.apply(surgery.parse(ROW), model)
    trained(model)
    fed = zoo.padded(model)
    wanted = model.generate(**fed, max_new_tokens=6, do_sample=False, use_cache=False)
    found = model.generate(**fed, max_new_tokens=6, do_sample=False, cache_implementation=cache)
    assert torch.equal(found, wanted)


@torch.no_grad()
def test_rows_of_a_batch_choose() -> None:
    """One row through the first adapter of two, one through none of them."""
    specimen = zoo.specimen("llama")
    base = specimen.logits()
    apply(ROW, specimen)
    trained(specimen.model)
    with surgery.route(specimen.model, ["a", None]):
        routed = specimen.logits()
    surgery.activate(specimen.model, "a")
    assert torch.allclose(routed[0], specimen.logits()[0], atol=1e-5)
    assert torch.allclose(routed[1], base[1], atol=1e-5)
    assert not torch.allclose(routed[0], base[0], atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("family", EVERYWHERE)
def test_saved_is_loaded(family: str, tmp_path: Path) -> None:
    specimen = zoo.specimen(family)
    apply(f"{ROW}; adapter bottleneck 2 after attn", specimen)
    trained(specimen.model)
    surgery.save(specimen.model, tmp_path / "out")
    again = {"model": zoo.specimen(family).model} if specimen.example else {}
    loaded = surgery.load(tmp_path / "out", **again)
    assert torch.equal(zoo.logits(loaded, specimen.inputs), specimen.logits())
    assert surgery.verify(loaded, example_inputs=specimen.example)


@torch.no_grad()
def test_a_merge_leaves_adapters_and_folds_what_is_under_them() -> None:
    """LoRA on the very projection that the adapter hangs on folds into it, also over codes."""
    specimen = zoo.specimen("llama")
    apply(f"quantize base nf4; lora rank 2 on ffn.down + attn.o; {ROW}", specimen)
    trained(specimen.model)
    before = specimen.logits()
    surgery.merge(specimen.model)
    assert (specimen.logits() - before).abs().max() < 1e-4
    down = specimen.model.model.layers[0].mlp.down_proj
    assert type(down) is nn.Linear
    assert isinstance(down.surgery_edge, Edge)
    assert all("adapter" in name for name in surgery.parameters(specimen.model))
    assert surgery.verify(specimen.model)


@torch.no_grad()
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("adapter bottleneck 3 after ffn", "lora rank 2 on ffn.down"),
        ("lora rank 2 on ffn.down + ffn.up", "adapter bottleneck 3 beside ffn"),
        ("adapter bottleneck 3 beside ffn as b", "adapter bottleneck 2 after ffn then b as a"),
    ],
)
def test_a_second_program(first: str, second: str) -> None:
    """On a module that is rewritten or replaced after its edge was hung on, or before: as if both had been one."""
    once, twice = zoo.specimen("opt"), zoo.specimen("opt")
    apply(f"{first}; {second}", once)
    apply(first, twice)
    apply(second, twice)
    trained(once.model)
    trained(twice.model)
    assert torch.equal(once.logits(), twice.logits())
    assert surgery.verify(twice.model)
