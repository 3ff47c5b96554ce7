"""`optimize`: the optimizer that is named, over what the program trains; paged without another bit; resumed."""

from __future__ import annotations

import copy
import gc
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery.errors import GraphError, PlanError, ProgramError
from surgery.operations.optimize import NAMES, Optimize
from surgery.training.choice import choices, choose
from tests import studied, zoo
from tests.reference_decoder import ReferenceDecoder, Shape, reference_decoder

WIDE = Shape(vocabulary=41, width=64, layers=1, heads=4, key_value_heads=2, ffn=80)  # 4,096 and more: 8-bit state
FED = (zoo.tokens(41),)


def applied(text: str, shape: Shape = WIDE, dtype: torch.dtype = torch.float32) -> ReferenceDecoder:
    model = reference_decoder(shape, dtype=dtype)
    return surgery.apply(surgery.parse(text), model, example_inputs=FED)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        model(*FED).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", NAMES)
def test_steps_what_the_program_trains_and_nothing_else(name: str) -> None:
    model = applied(f"train ffn\nlora rank 2 on attn.q\noptimize {name} lr 1e-3")
    optimizer = surgery.optimizer(model)
    stepped = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
    assert stepped == {id(tensor) for tensor in surgery.parameters(model).values()}
    before = values(model)
    steps(model, optimizer, 2)
    moved = {name for name, tensor in values(model).items() if not torch.equal(tensor, before[name])}
    assert moved == set(surgery.parameters(model))
    assert surgery.verify(model, example_inputs=FED)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("adamw lr 1e-3", lambda p: torch.optim.AdamW(p, lr=1e-3)),
        ("adam lr 0.01 beta1 0.8 beta2 0.9 eps 1e-6", lambda p: torch.optim.Adam(p, 0.01, (0.8, 0.9), 1e-6)),
        ("sgd lr 0.1 momentum 0.5", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5)),
        ("adamw lr 1e-3 decay 0.3", lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.3)),
    ],
)
def test_wide_ones_are_torchs_own(text: str, wanted: Any) -> None:
    """The same bits as with torch's optimizer over the same tensors."""
    ours, theirs = (applied(f"lora rank 2 on ffn\noptimize {text}") for _ in range(2))
    steps(ours, surgery.optimizer(ours), 3)
    steps(theirs, wanted(list(surgery.parameters(theirs).values())), 3)
    assert same(values(ours), values(theirs))


@pytest.mark.parametrize(
    ("text", "title", "options"),
    [
        ("adamw8bit lr 1e-3", "AdamW8bit", {"lr": 1e-3}),
        ("adam8bit lr 1e-3", "Adam8bit", {"lr": 1e-3}),
        ("lion8bit lr 1e-3", "Lion8bit", {"lr": 1e-3}),
        ("lion lr 1e-3 beta1 0.8", "Lion", {"lr": 1e-3, "betas": (0.8, 0.99)}),
        ("sgd8bit lr 0.1", "SGD8bit", {"lr": 0.1, "momentum": 0.9}),
    ],
)
def test_narrow_ones_are_bitsandbytes(text: str, title: str, options: dict[str, Any]) -> None:
    import bitsandbytes

    ours, theirs = (applied(f"train all linear\noptimize {text}") for _ in range(2))
    optimizer: Any = surgery.optimizer(ours)
    steps(ours, optimizer, 3)
    steps(theirs, getattr(bitsandbytes.optim, title)(list(surgery.parameters(theirs).values()), **options), 3)
    assert same(values(ours), values(theirs))
    if "8bit" in title:
        large = [tensor for tensor in surgery.parameters(ours).values() if tensor.numel() >= 4096]
        assert large
        assert all(optimizer.state[tensor]["state1"].dtype == torch.uint8 for tensor in large)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["adamw", "adam", "adamw8bit", "adam8bit", "lion", "lion8bit"])
def test_paged_has_the_bits_of_unpaged(name: str, dtype: torch.dtype) -> None:
    plain, paged = (
        applied(f"train all linear + norm\noptimize {name}{word} lr 1e-2 decay 0.1", dtype=dtype)
        for word in ("", " paged")
    )
    before = values(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = surgery.optimizer(paged)
        steps(paged, optimizer, 4)
    steps(plain, surgery.optimizer(plain), 4)
    assert same(values(plain), values(paged))
    assert not same(values(plain), before)
    held = [state for tensor in optimizer.param_groups[0]["params"] for state in state_of(optimizer, tensor)]
    assert held
    assert all(mapped(state) for state in held), "the state is in memory"


def state_of(optimizer: torch.optim.Optimizer, tensor: torch.Tensor) -> list[torch.Tensor]:
    """What is as large as the parameter."""
    state = optimizer.state[tensor]
    return [v for n, v in state.items() if isinstance(v, torch.Tensor) and v.shape == tensor.shape and n != "step"]


def mapped(tensor: torch.Tensor) -> bool:
    """Whether the memory belongs to a file, as the kernel has it."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *rest = line.split()
        start, stop = (int(each, 16) for each in span.split("-"))
        if start <= tensor.data_ptr() < stop:
            return len(rest) > 4 and "surgery-" in rest[4]
    return False


def test_the_file_is_gone_with_the_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left in the temporary directory, while it trains or after."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = applied("lora rank 2 on ffn\noptimize adamw paged lr 1e-3")
    optimizer = surgery.optimizer(model)
    steps(model, optimizer, 1)
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    assert os.listdir(tmp_path) == []
    del optimizer
    model.zero_grad()
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("paged", ["", " paged"])
@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "lion8bit"])
def test_resumed_training_is_training_on(name: str, paged: str, tmp_path: Path) -> None:
    """Model and optimizer saved after two steps, loaded and trained two more: the bits of four steps."""
    text = f"lora rank 3 on ffn\ntrain attn + norm\noptimize {name}{paged} lr 1e-2"
    through, model = applied(text), applied(text)
    steps(through, surgery.optimizer(through), 4)
    optimizer = surgery.optimizer(model)
    steps(model, optimizer, 2)
    surgery.save(model, tmp_path / "model")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    loaded: Any = surgery.load(tmp_path / "model", model=reference_decoder(WIDE, dtype=torch.float32))
    again = surgery.optimizer(loaded)
    again.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    if paged:
        held = [state for group in again.param_groups for p in group["params"] for state in state_of(again, p)]
        assert held
        assert all(mapped(state) for state in held)
    steps(loaded, again, 2)
    assert same(values(loaded), values(through))


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_a_paged_state_loads_into_an_unpaged_optimizer(name: str) -> None:
    text = "train ffn\noptimize {} lr 1e-2"
    paged, plain = applied(text.format(f"{name} paged")), applied(text.format(name))
    one, other = surgery.optimizer(paged), surgery.optimizer(plain)
    steps(paged, one, 2)
    steps(plain, other, 2)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    steps(paged, one, 2)
    steps(plain, other, 2)
    assert same(values(paged), values(plain))


def test_vectors_are_not_decayed() -> None:
    """A factor of IA3 belongs at one, a bias anywhere: decay pulls matrices only."""
    model = applied("ia3\nlora rank 2 on ffn\noptimize adamw lr 1e-3 decay 0.5")
    for group in surgery.optimizer(model).param_groups:
        assert {tensor.dim() > 1 for tensor in group["params"]} == {group["weight_decay"] == 0.5}


def test_the_plan_says_what_was_chosen() -> None:
    model = zoo.tiny("llama")
    for text, said in (
        ("adamw lr 1e-3", "torch's AdamW, on a CPU"),
        ("adamw8bit lr 1e-3", "bitsandbytes' AdamW8bit, on a CPU"),
        ("adamw8bit paged lr 1e-3", "bitsandbytes' AdamW8bit, its state in a memory-mapped file, on a CPU"),
        ("adamw paged lr 1e-3", "torch's AdamW, its state in a memory-mapped file, on a CPU"),
    ):
        program = surgery.parse(f"ia3\noptimize {text}")
        plan = surgery.plan(program, model, anatomy=studied.anatomy("llama"))
        assert said in str(plan)
        assert any(said in note for note in plan.to_json()["notes"])
        assert type(plan).from_json(plan.to_json()).notes == plan.notes


def test_of_a_model_without_weights_the_plan_says_both() -> None:
    paged = Optimize(name="adamw", lr=1e-3, paged=True)
    assert [choice.title for choice in choices(paged, "meta")] == ["PagedAdamW", "AdamW"]
    assert choose(paged, "cuda").said == "bitsandbytes' PagedAdamW, on CUDA"
    assert not choose(paged, "cuda").missing
    assert choose(paged, "xpu").home == "bitsandbytes"
    assert not choose(paged, "mps").mapped
    assert choose(paged, "mps").missing


def test_strict_takes_no_substitute() -> None:
    """Error S116, in the plan and for a model that was moved after it; without `paged` nothing is missing."""
    model = zoo.tiny("llama")
    anatomy = studied.anatomy("llama")
    with pytest.raises(PlanError) as refused:
        surgery.plan(surgery.parse("ia3\noptimize adamw8bit paged strict lr 1e-3"), model, anatomy=anatomy)
    assert refused.value.diagnostics[0].code == "S116"
    surgery.plan(surgery.parse("ia3\noptimize adamw8bit strict lr 1e-3"), model, anatomy=anatomy)


def test_two_optimizers_conflict() -> None:
    model = zoo.tiny("llama")
    for second in ("optimize sgd lr 1", "optimize adamw lr 0.001"):
        program = surgery.parse(f"ia3\noptimize adamw lr 0.001\n{second}")
        with pytest.raises(PlanError) as refused:
            surgery.plan(program, model, anatomy=studied.anatomy("llama"))
        assert refused.value.diagnostics[0].code == "S103"
        assert f"`{second}`" in str(refused.value)
        assert "`optimize adamw lr 0.001`" in str(refused.value)


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(PlanError) as refused:
        surgery.plan(
            surgery.parse("quantize base nf4\noptimize adamw lr 1e-3"),
            zoo.tiny("llama"),
            anatomy=studied.anatomy("llama"),
        )
    assert refused.value.diagnostics[0].code == "S115"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("optimize adamw", "S015"),
        ("optimize lr 1e-3", "S015"),
        ("optimize sgd lr 1 beta1 0.5", "S017"),
        ("optimize lion lr 1 eps 1e-8", "S017"),
        ("optimize sgd paged lr 1", "S017"),
        ("optimize sgd8bit lr 1 momentum 0", "S017"),
        ("optimize adamw lr 5%", "S012"),
        ("optimize adamw lr 0", "S013"),
        ("optimize adamw lr 1 beta1 1", "S013"),
    ],
)
def test_bad_options(text: str, code: str) -> None:
    with pytest.raises(ProgramError) as refused:
        surgery.parse(text)
    assert refused.value.diagnostics[0].code == code


def test_a_model_without_a_statement() -> None:
    model = applied("ia3")
    with pytest.raises(GraphError) as refused:
        surgery.optimizer(model)
    assert refused.value.diagnostics[0].code == "S371"
    with pytest.raises(GraphError) as refused:
        surgery.optimizer(reference_decoder(WIDE))
    assert refused.value.diagnostics[0].code == "S370"


def test_statement_on_a_part_is_refused() -> None:
    with pytest.raises(PlanError) as refused:
        surgery.plan(
            surgery.parse("ia3\noptimize adamw lr 1e-3 on attn"), zoo.tiny("llama"), anatomy=studied.anatomy("llama")
        )
    assert refused.value.diagnostics[0].code == "S121"
