"""Masks that move: budgets and swaps, exact counts, gradients only where they belong, the same masks again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import surgery
from surgery.operations.sparse import swapped
from surgery.operations.sparse_budget import erdos_renyi
from tests import zoo
from tests.reference_decoder import reference_decoder
from tests.training.wide import FED, RIGL, WIDE, applied, loss, places, train


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6), st.floats(0, 1))
def test_budgets_of_erdos_and_renyi(sizes: list[tuple[int, int]], share: float) -> None:
    """In all exactly what was asked; a matrix that is not dense keeps its ends times one number, to a weight."""
    kept = erdos_renyi(sizes, share)
    total = sum(a * b for a, b in sizes)
    assert sum(kept) == total - round(share * total)
    assert all(0 <= count <= a * b for count, (a, b) in zip(kept, sizes, strict=True))
    free = [(count, a + b) for count, (a, b) in zip(kept, sizes, strict=True) if count < a * b]
    assert all(abs(c * other - d * ends) <= ends + other for c, ends in free for d, other in free)
    if free:  # a dense one would have had to keep more than it has
        least = min((count + 1) / ends for count, ends in free)
        assert all(a * b <= least * (a + b) + 1 for count, (a, b) in zip(kept, sizes, strict=True) if count == a * b)


@given(st.integers(1, 30), st.integers(1, 30), st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
def test_swaps(rows: int, columns: int, kept: float, share: float, seed: int) -> None:
    """The count stays, among ties too; what goes is smallest, what comes has most growth and was zero before."""
    draws = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=draws) < kept
    size, growth = (torch.randint(0, 5, mask.shape, generator=draws).float() for _ in range(2))
    after = swapped(mask, size, growth, share)
    gone, come = mask & ~after, after & ~mask
    assert after.sum() == mask.sum()
    assert int(gone.sum()) == int(come.sum()) == min(round(share * int(mask.sum())), int((~mask).sum()))
    assert torch.equal(after, swapped(mask, size, growth, share))
    if gone.any():
        assert size[gone].max() <= size[mask & after].min() if (mask & after).any() else True
        assert growth[come].min() >= growth[~mask & ~come].max() if (~mask & ~come).any() else True


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("gpt2", torch.float64),
        ("nano", torch.bfloat16),
        pytest.param("llama", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("bert", torch.float32, marks=pytest.mark.slow),
        pytest.param("t5", torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_exact_counts_on_every_family(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """exact_sparsity: after swaps and cuts, saved and loaded, merged, through NF4; equal runs give equal masks."""
    text = (
        "sparse rigl 70% swap 50% every 2 steps on ffn\nprune magnitude 0% to 60% over 5 steps every 2 steps on attn.o"
    )
    kept = []
    for _ in range(2):
        specimen = zoo.specimen(family, dtype=dtype)
        model = surgery.apply(surgery.parse(text), specimen.model, example_inputs=specimen.example)
        optimizer = torch.optim.SGD(surgery.parameters(model).values(), lr=0.1, momentum=0.9, weight_decay=0.1)
        schedule = surgery.schedule(model, optimizer, steps=10)
        for _ in range(6):
            fed = specimen.inputs
            out = model(*fed) if isinstance(fed, tuple) else model(**fed).logits
            out.float().square().mean().backward()
            schedule.step()
            optimizer.step()
            optimizer.zero_grad()
        kept.append({each.part.path: each.mask() for each in places(model)})
    assert all(torch.equal(kept[0][path], kept[1][path]) for path in kept[0])
    steps = model.__dict__["_surgery"].plan.steps
    (gradual,) = (step.parts for step in steps if step.operation.verb == "prune")
    (swaps,) = (step for step in steps if step.operation.verb == "sparse")
    for part in gradual:
        assert int((~kept[0][part.path]).sum()) == round(0.6 * part.shape[0] * part.shape[1])
    total = sum(part.shape[0] * part.shape[1] for part in swaps.parts)
    assert sum(int((~kept[0][part.path]).sum()) for part in swaps.parts) == round(0.7 * total)
    assert surgery.verify(model, example_inputs=specimen.example)
    weights = {each.part.path: each.weight.detach().clone() for each in places(model)}
    merged = surgery.merge(model)
    assert all(torch.equal(merged.get_submodule(path).weight, weight) for path, weight in weights.items())
    codes = surgery.apply(surgery.parse("quantize base nf4"), merged, example_inputs=specimen.example)
    wide: Any = surgery.merge(codes)
    for path, mask in kept[0].items():
        weight = wide.get_submodule(path).weight
        mask = (
            mask if weight.shape == mask.shape and not any(p.transposed for p in (*gradual, *swaps.parts)) else mask.t()
        )
        assert bool((weight[~mask] == 0).all())
        assert bool((weight != 0).any())


def test_masked_weights_get_no_gradient_but_where_it_is_asked_for() -> None:
    model = applied(RIGL)
    optimizer = torch.optim.AdamW(surgery.parameters(model).values(), lr=0.01)
    schedule = surgery.schedule(model, optimizer)
    for step in range(1, 12):
        loss(model).backward()
        swap = step % 2 == 0 and step < 9
        for each in places(model):
            outside = each.lie(each.weight.grad)[~each.mask()]  # type: ignore[arg-type]
            assert bool((outside != 0).any()) == swap, "the dense gradient belongs to the steps that swap"
        assert schedule.step() == swap
        assert all((tensor.grad is None) == swap for tensor in surgery.parameters(model).values())
        optimizer.step()
        optimizer.zero_grad()


def test_accumulated_and_compiled_gradients_choose_the_same_masks() -> None:
    """Two halves of a batch are that batch; compiled code gives the gradient of every weight when it is asked."""
    masks = []
    for way in ("whole", "halves", "compiled"):
        model: Any = applied(RIGL, dtype=torch.float64)
        optimizer = torch.optim.SGD(surgery.parameters(model).values(), lr=0.1, momentum=0.9)
        schedule = surgery.schedule(model, optimizer)
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if way == "compiled" else model
        for _ in range(6):
            for rows in FED[0].split(1) if way == "halves" else [FED[0]]:
                (run(rows).square().mean() * len(rows) / len(FED[0])).backward()
            schedule.step()
            optimizer.step()
            optimizer.zero_grad()
        masks.append([each.mask() for each in places(model)])
    assert all(torch.equal(one, other) for others in masks[1:] for one, other in zip(masks[0], others, strict=True))


def test_a_gradient_that_is_no_number_swaps_nothing() -> None:
    model = applied(RIGL)
    optimizer = torch.optim.AdamW(surgery.parameters(model).values(), lr=0.01)
    schedule = surgery.schedule(model, optimizer)
    for scale, moved in ((1.0, False), (float("inf"), False), (1.0, False), (1.0, True)):
        (loss(model) * scale).backward()
        assert schedule.step() == moved
        if scale == 1.0:  # else a gradient scaler skips it
            optimizer.step()
        optimizer.zero_grad()
    assert surgery.verify(model, example_inputs=FED)


def test_seeds_and_steps_draw_other_weights() -> None:
    """SET grows at random: another seed or step grows others, the same ones the same."""
    text = "sparse set 80% swap 50% every 1 steps on ffn"
    found = []
    for seed in (0, 0, 1):
        model = applied(f"seed {seed}\n{text}")
        for each in places(model):
            each.put(torch.arange(each.mask().numel()).view(each.part.shape) % 5 == 0, 0)
        optimizer = torch.optim.SGD(surgery.parameters(model).values(), lr=0.0)
        first = [each.mask() for each in places(model)]
        train(model, optimizer, 1)
        found.append([each.mask() & ~was for each, was in zip(places(model), first, strict=True)])
    assert all(map(torch.equal, found[0], found[1]))
    assert not any(map(torch.equal, found[0], found[2]))
    (one, *_), (other, *_) = (places(applied(text)) for _ in range(2))
    assert torch.equal(*(torch.rand(9, generator=each.generator(3)) for each in (one, other)))
    assert not torch.equal(*(torch.rand(9, generator=one.generator(step)) for step in (3, 4)))


def test_the_plan_counts_what_is_kept() -> None:
    """The trainable share is that of kept weights; the zeros are told, and written down with the plan."""
    text = "sparse static 90% on ffn\ntrain ffn"
    plan = surgery.plan(surgery.parse(text), reference_decoder(WIDE), example_inputs=FED)
    total = 3 * 64 * 80
    kept = total - round(0.9 * total)
    (biases,) = (2 * 80 + 64 if WIDE.bias else 0,)
    assert plan.cost.trainable == kept + biases
    assert f"{round(0.9 * total):,} weights at zero" in str(plan)
    again = type(plan).from_json(plan.to_json())
    assert [step.operation.sizes() for step in again.steps] == [step.operation.sizes() for step in plan.steps]


def test_disabled_and_a_second_program() -> None:
    """Switched off, an adapter leaves the sparse base as it is trained; the schedule goes on below a new one."""
    model = applied(RIGL)
    optimizer = torch.optim.AdamW(surgery.parameters(model).values(), lr=0.01)
    schedule = surgery.schedule(model, optimizer)
    for _ in range(3):
        loss(model).backward()
        schedule.step()
        optimizer.step()
        optimizer.zero_grad()
    sparse = loss(model)
    surgery.apply(surgery.parse("lora rank 2 on ffn.down"), model, example_inputs=FED)
    with torch.no_grad():
        for name, tensor in surgery.parameters(model).items():
            if "lora_B" in name:
                tensor.fill_(0.1)
    assert not torch.equal(loss(model), sparse)
    with surgery.disabled(model):
        assert torch.equal(loss(model), sparse)
    masks = [each.mask() for each in places(model)]
    loss(model).backward()
    assert schedule.step()
    assert not all(map(torch.equal, masks, [each.mask() for each in places(model)]))
    assert surgery.verify(model, example_inputs=FED).of("exact_sparsity")
    copied = copy.deepcopy(model)
    assert torch.equal(loss(copied), loss(model))


def test_the_specs_are_trained() -> None:
    """specs/sparse.surgery and specs/lottery.surgery on a small encoder of their depth."""
    for name in ("sparse", "lottery"):
        model = zoo.tiny("bert", num_hidden_layers=6)
        program = surgery.load_program(Path(__file__).parents[2] / "specs" / f"{name}.surgery")
        surgery.apply(program, model)
        fed = zoo.inputs(model)

        def steps(model: Any, start: int, stop: int | None) -> None:
            optimizer = torch.optim.AdamW(surgery.parameters(model).values(), lr=1e-2)
            for _ in range(2):
                model(**fed).logits.square().mean().backward()  # noqa: B023
                optimizer.step()
                optimizer.zero_grad()

        before = [each.mask() for each in places(model)]
        if name == "lottery":
            surgery.lottery(model, steps)
        else:
            optimizer = surgery.optimizer(model)
            schedule = surgery.schedule(model, optimizer, steps=10_000)
            schedule.load_state_dict({"step": 99})
            model(**fed).logits.square().mean().backward()
            assert schedule.step()
        assert not all(map(torch.equal, before, [each.mask() for each in places(model)]))
        assert all(each.mask().any() for each in places(model))
