"""Laws of the whole model: what stays as it is, is saved, copied, verified and changed again."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

import surgery
from surgery.graph.module import rewritten
from surgery.language.program import Program
from surgery.operations.lora import Lora
from surgery.operations.prune import Prune
from surgery.operations.quantize import Quantize
from surgery.operations.sparse import Sparse
from tests.properties.case import Case, Law, bits, case_loss, randomise, same
from tests.properties.drawn import ANY, FLOATS, anything, cases, merging


def nothing_else_moves(case: Case) -> None:
    """Unselected tensors keep their bits, base names stay, gradients reach what was declared and nothing else."""
    base = case.build()
    keys = list(base.state_dict())
    before = {name: tensor.clone() for name, tensor in base.named_parameters()}
    model = case.apply(model=base).train()
    declared = surgery.parameters(model)
    now = dict(model.named_parameters())
    assert [name for name in model.state_dict() if name in before] == [name for name in keys if name in before]
    touched: set[str] = set()
    for step in case.plan().steps:
        if isinstance(step.operation, Prune | Sparse | Quantize) or getattr(step.operation, "from_weight", False):
            for part in step.parts:
                name = f"{part.path}.weight"
                touched.add(name)
                if part.channels is not None and name in now and now[name].shape == before[name].shape:
                    rows = torch.ones(part.shape[0], dtype=torch.bool)
                    for start, stop in part.channels:
                        rows[start:stop] = False
                    changed = (now[name] != before[name]).any(dim=1)
                    if sum(part.path == p.path for s in case.plan().steps for p in s.parts) == 1:
                        assert not changed[rows].any(), f"rows of {name} that were not selected moved"
    for name, tensor in before.items():
        assert name in touched or torch.equal(now[name], tensor), f"{name} moved"
    assert {name for name, parameter in now.items() if parameter.requires_grad} == set(declared)
    randomise(model)
    case_loss(model, case).backward()
    for name, parameter in now.items():
        assert (parameter.grad is not None) == (name in declared), name


def ties_stay_ties(case: Case) -> None:
    model = case.apply()
    assert model.head.weight is model.embed.weight
    randomise(model)
    if " embed" not in str(case.program):
        assert surgery.merge(model).head.weight is model.embed.weight


def saved_is_loaded(case: Case) -> None:
    model = case.apply()
    randomise(model)
    with tempfile.TemporaryDirectory() as directory:
        surgery.save(model, Path(directory) / "out")
        loaded = surgery.load(Path(directory) / "out", model=case.model.build())
    assert same(bits(model), bits(loaded))
    assert surgery.parameters(model).keys() == surgery.parameters(loaded).keys()
    assert torch.equal(case.run(model), case.run(loaded))
    with surgery.disabled(model), surgery.disabled(loaded):
        assert torch.equal(case.run(model), case.run(loaded))


def verify_is_green_and_leaves_no_trace(case: Case) -> None:
    model = case.apply()
    randomise(model)
    model.train()
    model.layers[0].eval()
    before, modes = bits(model), [module.training for module in model.modules()]
    where = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    report = surgery.verify(model, example_inputs=(case.model.tokens,))
    assert report, str(report)
    assert not report.warnings, str(report)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(before, bits(model))
    assert where == {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert modes == [module.training for module in model.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())
    json.dumps(report.to_json(), allow_nan=False)


def graphs_are_clean(case: Case) -> None:
    """Lint holds, new nodes say which statement they come from, and the model agrees with its own export."""
    model = case.apply()
    randomise(model)
    statements = {str(statement) for statement in case.program.statements}
    found: set[str] = set()
    for path, module in rewritten(model):
        module.graph.lint()
        module.full.lint()
        for node in module.full.nodes:
            names = [name for name in module.added if node.op == "get_attr" and node.target == name]
            assert not names or node.meta.get("statement") in statements, f"{path}: {node} says nothing"
        found |= {node.meta["statement"] for node in module.full.nodes if "statement" in node.meta}
    attached = {str(s) for s in case.program.statements if s.operation.phase == "attach"}
    assert attached <= found <= statements
    exported = torch.export.export(model.eval(), (case.model.tokens,), strict=False).module()
    wanted = case.run(model)
    eps = max(case.model.eps, torch.finfo(torch.float32).eps if case.has(Quantize) else 0.0)
    assert (exported(case.model.tokens) - wanted).abs().max() <= 64 * eps * wanted.abs().max()


def copies_are_independent(case: Case) -> None:
    model = case.apply()
    randomise(model)
    wanted = case.run(model)
    copied = copy.deepcopy(model)
    assert torch.equal(case.run(copied), wanted)
    randomise(copied, seed=1)
    assert not torch.equal(case.run(copied), wanted)
    assert torch.equal(case.run(model), wanted)


def programs_compose(case: Case) -> None:
    """Cut in two anywhere, one after the other, saved between or not: as one, or refused and nothing changed."""
    wanted = case.apply()
    statements, seed = case.program.statements, case.program.seed
    for cut in range(1, len(statements)):
        first, second = (Program(part, seed=seed) for part in (statements[:cut], statements[cut:]))
        if _has_nothing_to_do(first):
            continue
        if (code := _lacks_what_follows(first)) is not None:
            with pytest.raises(surgery.SurgeryError, match=code):
                case.plan(first)
            continue
        model = case.apply(first)
        with tempfile.TemporaryDirectory() as directory:
            surgery.save(model, Path(directory) / "out")
            loaded = surgery.load(Path(directory) / "out", model=case.build())
        before, logits = bits(model), case.run(model)
        if _comes_too_late(case, second, model):
            assert same(bits(model), before)
            assert torch.equal(case.run(model), logits)
            continue
        for again in (case.apply(second, model), case.apply(second, loaded)):
            assert same(bits(again), bits(wanted))
            assert torch.equal(case.run(again), case.run(wanted))
            with surgery.disabled(again), surgery.disabled(wanted):
                assert torch.equal(case.run(again), case.run(wanted))
        trained = case.apply(first)
        values = {name: tensor.clone() for name, tensor in randomise(trained).items()}
        if not _comes_too_late(case, second, trained):
            case.apply(second, trained)
            now = dict(trained.named_parameters())
            assert all(torch.equal(now[name], value) for name, value in values.items()), "trained values are lost"


def _has_nothing_to_do(program: Program) -> bool:
    """Whether it says how to train, and nothing that is trained."""
    operations = [statement.operation for statement in program.statements]
    trained = any(
        (each.phase in ("attach", "train") and not each.freezes) or isinstance(each, Sparse) for each in operations
    )
    if any(each.phase == "schedule" for each in operations):
        return not trained
    return all(each.freezes for each in operations)


def _lacks_what_follows(program: Program) -> str | None:
    """The code by which it is refused without what comes later: the next adapter of a chain, or codes for `loftq`."""
    operations = [statement.operation for statement in program.statements]
    names = {statement.name for statement in program.statements}
    if any(getattr(each, "then", None) not in {None, *names} for each in operations):
        return "S110"
    makes_up = any(isinstance(each, Lora) and each.start == "loftq" for each in operations)
    return "S380" if makes_up and not any(isinstance(each, Quantize) for each in operations) else None


def _comes_too_late(case: Case, program: Program, model: nn.Module) -> bool:
    try:
        case.plan(program, model)
    except surgery.SurgeryError as error:
        refusal = error
    else:
        return False
    assert {each.code for each in refusal.diagnostics} == {"S106"}, refusal
    with pytest.raises(surgery.SurgeryError):
        case.apply(program, model)
    return True


LAWS: tuple[Law, ...] = (
    Law("frame", "nothing else moves or is trained", nothing_else_moves, cases(anything, FLOATS), 2),
    Law("ties", "tied weights stay one tensor", ties_stay_ties, cases(merging, tied=True)),
    Law("round trip", "saved is loaded", saved_is_loaded, cases(anything, FLOATS), 2),
    Law(
        "verify",
        "verification is green and leaves no trace",
        verify_is_green_and_leaves_no_trace,
        cases(anything, FLOATS),
        3,
    ),
    Law("graphs", "lint clean, nodes say whose they are, exports agree", graphs_are_clean, cases(anything), 3),
    Law("again", "a second program is as if both had been one", programs_compose, cases(anything, FLOATS), 3),
    Law("copies", "a deep copy is equal and independent", copies_are_independent, ANY, 2),
)
