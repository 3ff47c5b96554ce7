"""Laws of what is trained: which tensors, their gradients and their optimizer."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

import surgery
from surgery.graph.module import rewritten
from surgery.language.program import Program
from surgery.operations.adapter import Adapter
from surgery.operations.optimize import Optimize
from surgery.operations.prefix import Prefix
from surgery.operations.prune import Prune
from surgery.operations.quantize import Quantize
from tests.properties import hand
from tests.properties.case import Case, Law, bits, case_loss, randomise, same
from tests.properties.drawn import ANY, cases, optimized, trained


def exactly_what_is_said_is_trained(case: Case) -> None:
    """Names by hand: what `train` selects less what `freeze` does; pruned weights keep their zeros when stepped."""
    model = case.apply()
    wanted = hand.trained(case.program, case.build())
    found = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert {name for name in found if not name.endswith(hand.ADDED)} == wanted
    zeros = {name: tensor == 0 for name, tensor in surgery.parameters(model).items() if name in wanted}
    before = bits(model)
    stepper = torch.optim.AdamW(surgery.parameters(model).values(), lr=0.01)
    case_loss(model.train(), case).backward()
    stepper.step()
    pruned = any(isinstance(statement.operation, Prune) for statement in case.program.statements)
    for name, tensor in surgery.parameters(model).items():
        assert not torch.equal(tensor, before[name]), f"{name} does not move"
        if pruned and name in wanted and tensor.dim() > 1 and name.rpartition(".")[0] != "embed":
            assert (tensor[zeros[name]] == 0).all(), f"{name} has lost zeros"
    found = surgery.verify(model, example_inputs=(case.model.tokens,)).of("frame")
    assert found
    assert all(finding.status == "holds" for finding in found)


def optimizers_step_what_is_trained(case: Case) -> None:
    """Every optimizer moves what the program trains and nothing else; paged gives the bits of unpaged."""
    one, other = case.apply(), case.apply(_unpaged(case.program))
    before = bits(one)
    pushed: set[str] = set()
    for model in (one, other):
        optimizer = surgery.optimizer(model)
        for _ in range(2):
            case_loss(model, case).backward()
            pushed |= {name for name, tensor in surgery.parameters(model).items() if tensor.grad.abs().max() > 1e-6}
            optimizer.step()
            optimizer.zero_grad()
    assert same(bits(one), bits(other))
    moving = set(map(id, surgery.parameters(one).values()))  # tied ones under every name
    trained = {name for name, tensor in one.named_parameters(remove_duplicate=False) if id(tensor) in moving}
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(one).items() if name not in trained)
    still = {name for name in pushed if torch.equal(one.get_parameter(name), before[name])}
    assert pushed
    assert not still, f"{still} have gradients and do not move"


def _unpaged(program: Program) -> Program:
    plain = (
        replace(s, operation=replace(s.operation, paged=False)) if isinstance(s.operation, Optimize) else s
        for s in program.statements
    )
    return Program(tuple(plain), seed=program.seed)


def _may_be_still(program: Program) -> tuple[str, ...]:
    """Parts of names of tensors on which nothing may depend.

    A recurrent network that makes one position has read nothing before it; a softmax of one key is 1 for any; few
    units of a function with flat ends may all be there, for each of few tokens.
    """
    operations = [statement.operation for statement in program.statements]
    names = ["weight_hh"]
    names += ["prefix_key" for each in operations if isinstance(each, Prefix) and each.gated and each.positions == 1]
    names += ["adapter_" for each in operations if isinstance(each, Adapter) and each.activation in FLAT]
    return tuple(names)


FLAT = ("relu", "relu6", "hardswish")


def gradients_are_those_of_the_written_graph(case: Case) -> None:
    """What runs (fused, with gradients of its own) against the graph as methods wrote it, node by node."""
    model = case.apply().train()
    randomise(model)
    torch.manual_seed(0)
    before = bits(model)
    case_loss(model, case).backward()
    assert same(before, bits(model)), "a backward pass wrote to the model"
    found = {name: parameter.grad.clone() for name, parameter in surgery.parameters(model).items()}
    model.zero_grad()
    for _, module in rewritten(model):
        if module.facts is not None:
            module.forward = partial(torch.fx.Interpreter(module, graph=module.full).run)
    torch.manual_seed(0)
    case_loss(model, case).backward()
    wanted = {name: parameter.grad for name, parameter in surgery.parameters(model).items()}
    still = _may_be_still(case.program)
    # What cancels in one gradient is rounded as the others are.
    largest = max((gradient.abs().max().item() for gradient in wanted.values()), default=0.0)
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0 or any(part in name for part in still), f"{name} gets no gradient"
        slack = 1e-5 if case.has(Quantize) else 1e-10  # `compute fp32` rounds on its way
        assert torch.allclose(found[name], gradient, rtol=0, atol=slack * largest), name


LAWS: tuple[Law, ...] = (
    Law(
        "gradients",
        "the graph that runs has the written graph's gradients",
        gradients_are_those_of_the_written_graph,
        ANY,
        2,
    ),
    Law("trained", "exactly what is said is trained", exactly_what_is_said_is_trained, cases(trained), 2),
    Law(
        "optimizer",
        "steps what is trained, the same bits paged",
        optimizers_step_what_is_trained,
        cases(optimized, ("float64", "float32")),
        2,
    ),
)
