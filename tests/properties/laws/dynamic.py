"""Sparse training written out in plain torch, from the papers: dense weights, masks beside them, one loop."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import surgery
from surgery.compiler.plan import Plan
from surgery.graph.site import seed_of
from surgery.operations.lottery import Lottery
from surgery.operations.prune import Prune
from surgery.operations.sparse import Sparse
from tests import strategies
from tests.properties.case import Law
from tests.properties.drawn import FLOATS, cases, masked

if TYPE_CHECKING:
    from tests.properties.case import Case

STEPS = 12
OPTIMIZERS: tuple[Callable[[Any], torch.optim.Optimizer], ...] = (
    lambda tensors: torch.optim.AdamW(tensors, lr=0.01, weight_decay=0.1),
    lambda tensors: torch.optim.SGD(tensors, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
)


def loss(model: nn.Module, case: Case, step: int) -> Tensor:
    """Another batch at every step."""
    logits = model(case.model.tokens.roll(step, 1))
    return (logits * torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype)).square().mean()


def due(operation: Any, step: int) -> bool:
    """Whether masks change at this step, the first one being 1."""
    if isinstance(operation, Prune):
        return step == operation.over or (step < operation.over and step % operation.every == 0)
    last = end_of(operation)
    return operation.method != "static" and step % operation.every == 0 and (last is None or step < last)


def end_of(sparse: Any) -> int | None:
    """The step from which on the mask stays."""
    until = 0.75 if sparse.until is None and sparse.method == "rigl" else sparse.until
    return int(until * STEPS) if isinstance(until, float) else until


def swapped(sparse: Any, step: int, mask: Tensor, weight: Tensor, growth: Tensor) -> Tensor:
    """alpha/2 (1 + cos(pi t / T)) of what is kept: the smallest go, of the others the largest in growth come."""
    last = end_of(sparse)
    alpha = sparse.swap or 0.3
    share = alpha if last is None else alpha / 2 * (1 + math.cos(step * math.pi / last))
    kept, others = mask.flatten().nonzero().flatten(), (~mask).flatten().nonzero().flatten()
    count = min(round(share * len(kept)), len(others))
    after = mask.flatten().clone()
    after[kept[weight.abs().flatten()[kept].argsort(stable=True)[:count]]] = False
    after[others[growth.abs().flatten()[others].argsort(stable=True)[len(others) - count :]]] = True
    return after.view_as(mask)


def cut(share: float, masks: dict[str, Tensor], weights: dict[str, Tensor], together: bool) -> dict[str, Tensor]:
    """What is zero stays it, and the smallest others follow: round(share * all) in all, of each matrix or together."""
    groups = [list(masks)] if together else [[name] for name in masks]
    after = {}
    for names in groups:
        mask = torch.cat([masks[name].flatten() for name in names])
        size = torch.cat([weights[name].detach().abs().flatten() for name in names])
        order = torch.cat([(~mask).nonzero().flatten(), *([k] if len(k := ranked(mask, size)) else [])])
        gone = torch.ones_like(mask)
        gone[order[: round(share * len(mask))]] = False
        for name, part in zip(names, gone.split([masks[name].numel() for name in names]), strict=True):
            after[name] = part.view_as(masks[name])
    return after


def ranked(mask: Tensor, size: Tensor) -> Tensor:
    """Indices of what a mask keeps, the smallest first."""
    kept = mask.nonzero().flatten()
    return kept[size[kept].argsort(stable=True)]


def weights_of(plan: Plan, model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that the program trains under masks, by name; in (out, in) as they lie."""
    parts = [part for step in plan.steps if isinstance(step.operation, Sparse | Prune | Lottery) for part in step.parts]
    return {part.path: model.get_parameter(f"{part.path}.weight") for part in parts}


def started(case: Case) -> tuple[nn.Module, dict[str, nn.Parameter], dict[str, Tensor]]:
    """A plain model with the weights that the program starts from, and where they are kept."""
    plan, base, model = case.plan(), case.build(), case.apply()
    mine, theirs = weights_of(plan, base), weights_of(plan, model)
    masks = {name: tensor.detach() != 0 for name, tensor in theirs.items()}
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.mul_(masks[name])
            assert torch.equal(tensor, theirs[name]), "what a mask keeps has its bits"
            tensor.requires_grad_(True)
    return base, mine, masks


def by_hand(case: Case, make: Callable[[Any], torch.optim.Optimizer]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and masks after some steps of one statement's method."""
    (statement,) = case.program.statements
    operation: Any = statement.operation
    model, weights, masks = started(case)
    optimizer = make(weights.values())
    for step in range(1, STEPS + 1):
        loss(model, case, step).backward()  # all weights get a gradient: the model is a dense one
        before = masks
        if due(operation, step):
            if isinstance(operation, Prune):
                left = 1 - step / operation.over
                share = operation.to + (operation.amount - operation.to) * left**3
                masks = cut(share, masks, weights, operation.global_)
            else:
                growth = {name: tensor.grad for name, tensor in weights.items()}
                if operation.method == "set":
                    seeds = {name: seed_of(case.program.seed, name, "sparse", step) for name in weights}
                    draws = {name: torch.Generator().manual_seed(seed) for name, seed in seeds.items()}
                    growth = {name: torch.rand(w.shape, generator=draws[name]) for name, w in weights.items()}
                masks = {n: swapped(operation, step, masks[n], weights[n].detach(), growth[n]) for n in masks}
            for name, tensor in weights.items():
                same = before[name] & masks[name]
                tensor.data *= same
                for held in optimizer.state[tensor].values() if tensor in optimizer.state else ():
                    if isinstance(held, Tensor) and held.dim():
                        held *= same
        if due(operation, step) and getattr(operation, "method", "") == "rigl":
            optimizer.zero_grad()  # the swap takes the place of the step
            continue
        for name, tensor in weights.items():
            assert tensor.grad is not None
            tensor.grad *= before[name] & masks[name]
        optimizer.step()
        optimizer.zero_grad()
    return {name: tensor.detach() for name, tensor in weights.items()}, masks


def trained_as_in_the_papers(case: Case) -> None:
    """The weights of every step's swaps, cuts and gradient steps, to the bit; and the masks do move."""
    (statement,) = case.program.statements
    for make in OPTIMIZERS:
        wanted, masks = by_hand(case, make)
        model = case.apply()
        optimizer = make(surgery.parameters(model).values())
        schedule = surgery.schedule(model, optimizer, steps=STEPS)
        turns = [step for step in range(1, STEPS + 1) if _stepped(model, case, optimizer, schedule, step)]
        found = weights_of(case.plan(), model)
        assert found.keys() == wanted.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, wanted[name]), f"{name} is trained otherwise"
            assert (tensor[~masks[name]] == 0).all()
        assert set(turns) <= {step for step in range(1, STEPS + 1) if due(statement.operation, step)}
        moves = any(not torch.equal(masks[name], mask) for name, mask in started(case)[2].items())
        assert bool(turns) >= moves
        report = surgery.verify(model, example_inputs=(case.model.tokens,))
        assert report, str(report)


def _stepped(model: nn.Module, case: Case, optimizer: Any, schedule: Any, step: int) -> bool:
    loss(model, case, step).backward()
    changed: bool = schedule.step()
    optimizer.step()
    optimizer.zero_grad()
    return changed


def interrupted_training_goes_on(case: Case) -> None:
    """Saved and loaded after any step, right in front of a swap too: the bits of training in one go."""
    (statement,) = case.program.statements
    make = OPTIMIZERS[0]
    model = case.apply()
    optimizer = make(surgery.parameters(model).values())
    schedule = surgery.schedule(model, optimizer, steps=STEPS)
    stop = 2 * statement.operation.every - 1  # type: ignore[attr-defined]
    for step in range(1, stop + 1):
        _stepped(model, case, optimizer, schedule, step)
    with tempfile.TemporaryDirectory() as directory:
        surgery.save(model, Path(directory) / "out")
        loaded = surgery.load(Path(directory) / "out", model=case.build())
    again = make(surgery.parameters(loaded).values())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other = surgery.schedule(loaded, again, steps=STEPS)
    other.load_state_dict(schedule.state_dict())
    early = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for step in range(stop + 1, STEPS + 1):
        _stepped(model, case, optimizer, schedule, step)
        _stepped(loaded, case, again, other, step)
    one, two = model.state_dict(), loaded.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], early[name]) for name in one)
    merged = surgery.merge(loaded)
    for name, tensor in weights_of(case.plan(), merged).items():
        assert torch.equal(tensor, weights_of(case.plan(), model)[name]), "a merge keeps the weights and their zeros"


def tickets_as_in_the_paper(case: Case) -> None:
    """Train, prune, put back to the step of `rewind`, by hand; round r leaves (1 - share)^(r / rounds)."""
    (statement,) = case.program.statements
    lottery: Any = statement.operation
    make = OPTIMIZERS[0]

    def train(model: nn.Module, start: int, stop: int | None) -> None:
        tensors = [tensor for tensor in model.parameters() if tensor.requires_grad]
        optimizer = make(tensors)
        for step in range(start + 1, (STEPS if stop is None else stop) + 1):
            loss(model, case, step).backward()
            for tensor, mask in zip(tensors, kept.values(), strict=True) if model is plain else ():
                tensor.grad *= mask
            optimizer.step()
            optimizer.zero_grad()

    plain, weights, kept = started(case)
    assert all(mask.all() for mask in kept.values()), "the network is dense at first"
    order = [name for name, tensor in plain.named_parameters() if tensor.requires_grad]
    kept = {name.removesuffix(".weight"): kept[name.removesuffix(".weight")] for name in order}
    model = case.apply()
    surgery.lottery(model, train)
    train(plain, 0, lottery.rewind)
    early = {name: weights[name].detach().clone() for name in kept}
    for number in range(1, lottery.rounds + 1):
        train(plain, lottery.rewind, None)
        share = 1 - (1 - lottery.amount) ** (number / lottery.rounds)
        kept = cut(share, kept, {name: weights[name] for name in kept}, lottery.global_)
        with torch.no_grad():
            for name, mask in kept.items():
                weights[name].copy_(early[name] * mask)
    found = weights_of(case.plan(), model)
    assert all(torch.equal(found[name], weights[name]) for name in kept)
    zeros, total = sum(int((~mask).sum()) for mask in kept.values()), sum(mask.numel() for mask in kept.values())
    assert abs(zeros - lottery.amount * total) <= len(kept)
    assert surgery.verify(model, example_inputs=(case.model.tokens,))


LAWS: tuple[Law, ...] = (
    Law(
        "sparse training",
        "swaps, cuts and steps are those of the papers, to the bit",
        trained_as_in_the_papers,
        cases(masked(strategies.sparses, strategies.gradual), ("float64", "float32")),
        3,
    ),
    Law(
        "resumed",
        "a schedule that is interrupted goes on with the same bits",
        interrupted_training_goes_on,
        cases(masked(lambda: strategies.sparses(("set", "rigl")), strategies.gradual), FLOATS),
        3,
    ),
    Law(
        "tickets",
        "lottery tickets are those of the paper",
        tickets_as_in_the_paper,
        cases(masked(strategies.lotteries)),
        3,
    ),
)
