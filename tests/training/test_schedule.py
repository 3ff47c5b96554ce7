"""Masks that move: exact counts, zeros that no optimizer moves, gradients only where they belong, bad input refused."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import surgery
from surgery.anatomy.parts import Anatomy
from surgery.errors import GraphError, PlanError, SurgeryError
from surgery.operations.sparse import swapped
from surgery.operations.sparse_budget import erdos_renyi
from surgery.training.masks import MaskedWeight, weights_of
from tests import studied, zoo
from tests.reference_decoder import ReferenceDecoder, Shape, reference_decoder

WIDE = Shape(vocabulary=41, width=64, layers=1, heads=4, key_value_heads=2, ffn=80)  # 4,096 and more: 8-bit state
FED = (zoo.tokens(41),)
RIGL = "sparse rigl 80% swap 30% every 2 steps until 9 steps on ffn"
GRADUAL = "prune magnitude 10% to 80% over 8 steps every 2 steps on ffn"
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, foreach=False),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01, weight_decay=0.1),
    "radam": lambda p: torch.optim.RAdam(p, 0.01, weight_decay=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, 0.01, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01, weight_decay=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, 1.0, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p, 0.01),
    "asgd": lambda p: torch.optim.ASGD(p, 0.01, weight_decay=0.1),
}
NAMED = ("adamw", "adamw8bit", "adam8bit", "lion", "lion8bit", "sgd8bit", "adamw8bit paged", "adamw paged")


def applied(text: str, shape: Shape = WIDE, dtype: torch.dtype = torch.float32) -> ReferenceDecoder:
    model = reference_decoder(shape, dtype=dtype)
    return surgery.apply(surgery.plan(surgery.parse(text), model, anatomy=anatomy(shape)), model)


@cache
def anatomy(shape: Shape) -> Anatomy:
    return surgery.study(reference_decoder(shape), FED)


def places(model: nn.Module) -> list[MaskedWeight]:
    record: Any = model.__dict__["_surgery"]
    return [
        each
        for step in record.plan.steps
        if "mask" in step.operation.claims(None)
        for each in weights_of(step, model, 0)
    ]


def loss(model: nn.Module) -> Tensor:
    return model(*FED).square().mean()  # type: ignore[no-any-return]


def train(model: nn.Module, optimizer: Any, steps: int, late: bool = False, **known: Any) -> list[bool]:
    """Whether masks moved at each step. late: the schedule's step comes after the optimizer's."""
    schedule = surgery.schedule(model, optimizer, **known)
    moved = []
    for _ in range(steps):
        loss(model).backward()
        for each in (schedule, optimizer) if not late else (optimizer, schedule):
            told = each.step()
            moved += [told] if each is schedule else []
        for each in places(model):
            assert bool((each.lie(each.weight.detach())[~each.mask()] == 0).all()), "a zero has moved"
        optimizer.zero_grad()
    return moved


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


@pytest.mark.parametrize("text", [RIGL, RIGL.replace("rigl", "set"), GRADUAL], ids=lambda text: text.split()[1])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimizer_of_torch_moves_a_zero(name: str, text: str) -> None:
    for late in (False, True):
        model = applied(text)
        before = [each.weight.detach().clone() for each in places(model)]
        assert any(train(model, OPTIMIZERS[name](surgery.parameters(model).values()), 10, late))
        assert not any(torch.equal(each.weight, was) for each, was in zip(places(model), before, strict=True))
        report = surgery.verify(model, example_inputs=FED)
        assert report, str(report)


@pytest.mark.parametrize("text", [RIGL, RIGL.replace("rigl", "set"), GRADUAL], ids=lambda text: text.split()[1])
@pytest.mark.parametrize("name", NAMED)
def test_no_named_optimizer_moves_a_zero(name: str, text: str) -> None:
    """bitsandbytes' 8-bit states too, in memory and paged: a zero there is a code."""
    for late in (False, True):
        model = applied(f"{text}\noptimize {name} lr 0.01 decay 0.1")
        optimizer: Any = surgery.optimizer(model)
        assert any(train(model, optimizer, 10, late))
        if "8bit" in name:
            assert any(
                each.dtype == torch.uint8
                for state in optimizer.state.values()
                for each in state.values()
                if isinstance(each, Tensor)
            )
        assert surgery.verify(model, example_inputs=FED)


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


def test_static_masks_are_left_alone() -> None:
    model = applied("sparse static 80% on ffn")
    masks = [each.mask() for each in places(model)]
    assert not any(train(model, OPTIMIZERS["adamw"](surgery.parameters(model).values()), 4))
    assert all(torch.equal(each.mask(), mask) for each, mask in zip(places(model), masks, strict=True))


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


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("sparse static 90% on ffn\nfreeze ffn.up", "S115", "freeze ffn.up"),
        ("sparse static 90% on ffn\nquantize base nf4", "S114", "quantize base nf4"),
        ("sparse static 90% on ffn\nprune magnitude 50% on ffn.up", "S103", "prune magnitude 50%"),
        ("lottery 90% rounds 2 on ffn\nsparse rigl 50% on ffn.up", "S103", "sparse rigl 50%"),
        ("lora rank 2 init pissa on ffn\nsparse rigl 50% on ffn.up", "S103", "sparse rigl 50%"),
        ("sparse static 99.99% on ffn", "S117", "sparse static 99.99%"),
    ],
)
def test_what_does_not_go_together(text: str, code: str, said: str) -> None:
    with pytest.raises(PlanError) as refused:
        surgery.plan(surgery.parse(text), reference_decoder(WIDE), example_inputs=FED)
    assert refused.value.diagnostics[0].code == code
    assert said in str(refused.value)


def test_a_fused_projection_is_masked_whole() -> None:
    model = zoo.tiny("gpt2")
    for text in (
        "sparse static 50% on attn.q",
        "lottery 50% rounds 1 on attn.q",
        "prune magnitude 0% to 9% over 100 steps on attn.q",
    ):
        with pytest.raises(PlanError, match="select it whole"):
            surgery.plan(surgery.parse(text), model, anatomy=studied.anatomy("gpt2"))
    assert surgery.plan(surgery.parse("sparse static 50% on attn.q,k,v"), model, anatomy=studied.anatomy("gpt2")).places


def test_schedules_that_cannot_be_kept() -> None:
    def code(of: Any) -> str:
        with pytest.raises(SurgeryError) as refused:
            of()
        assert isinstance(refused.value, GraphError)
        return refused.value.diagnostics[0].code

    def optimizer(model: nn.Module) -> Any:
        return torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad] or [nn.Parameter(torch.ones(1))], lr=0.1
        )

    plain, adapted, share = reference_decoder(WIDE), applied("ia3"), applied("sparse rigl 80% every 5 steps on ffn")
    assert code(lambda: surgery.schedule(plain, optimizer(plain))) == "S370"
    assert code(lambda: surgery.schedule(adapted, optimizer(adapted))) == "S372"
    assert code(lambda: surgery.schedule(share, optimizer(share))) == "S373"
    assert code(lambda: surgery.schedule(share, optimizer(share), steps=6)) == "S373"
    assert code(lambda: surgery.schedule(share, optimizer(plain), steps=60)) == "S374"
    assert code(lambda: surgery.lottery(plain, lambda *_: None)) == "S370"
    assert code(lambda: surgery.lottery(share, lambda *_: None)) == "S372"
    model = applied(RIGL)
    eager = surgery.schedule(model, optimizer(model))
    eager.step()
    assert code(eager.step) == "S374"  # no backward pass has been


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


@pytest.mark.parametrize("name", ["adamw8bit", "lion8bit"])
def test_trained_pruned_weights_keep_their_zeros_in_8_bits(name: str) -> None:
    """Without a schedule too, and in a fused projection of which only some rows are pruned."""
    model = zoo.tiny("gpt2", n_embd=66, n_inner=70)
    surgery.apply(
        surgery.parse(f"train attn + ffn\nprune magnitude 50% on attn.q,v + ffn\noptimize {name} lr 0.01"), model
    )
    zeros = {each.part.path: each.weight == 0 for each in places(model)}
    optimizer: Any = surgery.optimizer(model)
    fed = zoo.inputs(model)
    for _ in range(3):
        model(**fed).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for each in places(model):
        assert optimizer.state[each.weight]["state1"].dtype == torch.uint8
        assert torch.equal(each.weight == 0, zeros[each.part.path])
    assert surgery.verify(model).of("exact_sparsity")


def test_codes_have_no_zeros_to_hold() -> None:
    """A pruned weight in four bits is not trained, whatever the optimizer of what is."""
    model = applied("prune magnitude 50% on ffn\nquantize base nf4\nlora rank 2 on ffn\noptimize adamw8bit lr 0.01")
    optimizer: Any = surgery.optimizer(model)
    before = {name: tensor.clone() for name, tensor in surgery.parameters(model).items()}
    loss(model).backward()
    optimizer.step()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in surgery.parameters(model).items())
    assert surgery.verify(model, example_inputs=FED)
