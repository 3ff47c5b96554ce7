"""Every verb alone and with every other: statements drawn by verb, and what must hold of any program, by its promises.

A new verb needs a line in STATEMENTS; its promises say which checks it is put to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import nn

import surgery
from surgery.errors import PlanError
from surgery.language import parse
from surgery.language.program import Program, Statement
from surgery.language.selector import Role, Union
from surgery.operations.base import Operation
from surgery.operations.freeze import Freeze
from surgery.operations.ia3 import Ia3
from surgery.operations.instruct import Instruct
from surgery.operations.shots import Shots
from surgery.operations.train import Train
from tests import strategies, zoo
from tests.properties.case import Case, bits, randomise, same, sites
from tests.properties.laws import adapting, keeping, planning
from tests.properties.laws.requiring import HELD_OUT
from tests.strategies import Model

Drawn = st.SearchStrategy[Statement]
LAYERS, EXAMPLES = Role("layers"), Path(__file__).parent / "examples.jsonl"
REFUSALS = {"S103", "S106", "S114", "S115"}


def _on_layers(operation: st.SearchStrategy[object]) -> Drawn:
    return st.builds(Statement, operation, st.just(LAYERS))  # type: ignore[arg-type]


def _trained(model: Model) -> Drawn:
    roles = ["norm", "embed", "head", "attn", "ffn", *(["bias"] if model.shape.bias else [])]
    plain = st.builds(Statement, st.just(Train()), st.sampled_from(roles).map(Role))
    return plain | st.just(Statement(Train(add=True), Role("bias")))


def _read_as(*texts: str) -> Drawn:
    return st.sampled_from([parse(text).statements[0] for text in texts])


STATEMENTS: Mapping[str, Callable[[Model], Drawn]] = MappingProxyType(
    {
        "adapter": lambda model: strategies.bottlenecks(model).map(lambda made: made[0]),
        "drop": lambda model: _read_as("drop layers 0"),
        "freeze": lambda model: st.builds(Statement, st.just(Freeze()), st.sampled_from(["norm", "attn"]).map(Role)),
        "ia3": lambda model: strategies.statements(model, st.just(Ia3())),
        "instruct": lambda model: _on_layers(
            st.builds(Instruct, text=st.sampled_from(["w5", "w6 w7 w8"]), cached=st.booleans())
        ),
        "lora": lambda model: strategies.statements(model, strategies.loras()),
        "optimize": lambda model: st.builds(Statement, strategies.optimizes(), st.just(Union(()))),
        "lottery": lambda model: strategies.masked(model, strategies.lotteries()),
        "moe": lambda model: _read_as("moe 3 experts top 2 on ffn", "moe 1 experts top 1 on ffn in layers 0"),
        "prefix": lambda model: _on_layers(strategies.prefixes()),
        "prompt": lambda model: _on_layers(strategies.prompts().filter(lambda made: made.verb == "prompt")),
        "prune": lambda model: (
            strategies.statements(model, strategies.prunes()) | strategies.masked(model, strategies.gradual())
        ),
        "prune channels": lambda model: _read_as("prune channels 40% nearest", "prune channels 50% by random nearest"),
        "prune heads": lambda model: _read_as(
            "prune heads 50% nearest on attn", "prune heads 30% query nearest on attn"
        ),
        "prune neurons": lambda model: _read_as(
            "prune neurons 40% nearest on ffn", "prune neurons 50% by random nearest on ffn"
        ),
        "ptuning": lambda model: _on_layers(strategies.prompts().filter(lambda made: made.verb == "ptuning")),
        "quantize": lambda model: st.builds(
            Statement, strategies.quantizes(), st.sampled_from(["base", "ffn"]).map(Role)
        ),
        "repeat": lambda model: _read_as("repeat layers 0", "repeat layers 0 silent", "repeat all layers"),
        "require perplexity": lambda model: _read_as(
            f'require perplexity <= 1e6 using "{HELD_OUT}"', f'require perplexity <= 1e6 of base using "{HELD_OUT}"'
        ),
        "require size": lambda model: _read_as("require size <= 9 of base", "require size < 1 GB"),
        "require trainable": lambda model: _read_as("require trainable <= 100%", "require trainable >= 0"),
        "require zeros": lambda model: _read_as("require zeros >= 0% on ffn", "require zeros <= 100% on attn.q"),
        "shots": lambda model: _on_layers(st.builds(Shots, count=st.integers(1, 2), from_=st.just(EXAMPLES))),
        "sparse": lambda model: strategies.masked(model, strategies.sparses()),
        "train": _trained,
    }
)


@st.composite
def programs(draw: st.DrawFn, model: Model, verbs: tuple[str, ...]) -> Program:
    """A statement of each of these verbs; the second has a name half of the time."""
    made = [draw(STATEMENTS[verb](model)) for verb in verbs]
    if len(made) > 1 and made[1].operation.phase == "attach" and draw(st.booleans()):
        made[1] = replace(made[1], name="second")
    return Program(tuple(made), seed=draw(st.integers(0, 3)))


def everything_promised_holds(case: Case) -> None:
    """All checks that the program's promises put it to; a program that is refused changes nothing and names both."""
    if not _is_accepted(case):
        return
    operations = [statement.operation for statement in case.program.statements]
    attached = [each for each in operations if each.phase == "attach" or getattr(each, "add", False)]
    attached = attached if any(module.branches() for module in sites(case.apply())) else []
    promised = [set(each.promises()) for each in attached]
    planning.order_means_nothing(case)
    keeping.saved_is_loaded(case)
    two_programs_are_one(case)
    trained = bool(surgery.parameters(case.apply()))
    if trained and not any(each.reshapes() for each in operations):  # what was cut out has other tensors
        keeping.nothing_else_moves(case)
    if trained and attached and all("off_means_off" in each for each in promised):
        _off_means_off(case)
    if attached and all("identity_at_init" in each for each in promised):
        _starts_as_nothing(case)
    plain = not any(getattr(each, "add", False) for each in operations)  # a merge gives added biases names of their own
    if (
        plain
        and trained
        and attached
        and all("merges" in each.promises() for each in operations if each.phase != "schedule")
    ):
        adapting.merging_changes_nothing(case)


def two_programs_are_one(case: Case) -> None:
    """One statement after the other, both ways round: the bits of both at once, or refused with the reason."""
    wanted = case.apply()
    for first, second in (case.program.statements, reversed(case.program.statements)) if _two(case) else ():
        seed = case.program.seed
        if first.operation.phase == "schedule" or first.operation.freezes:
            continue  # has nothing to do on its own
        model = case.apply(Program((first,), seed=seed))
        before, logits = bits(model), case.run(model)
        error = _refusal(case, Program((second,), seed=seed), model)
        if error is not None:
            required = second.operation.phase == "require"  # compares with a base that is no longer there
            late = "S133" if second.operation.reshapes() else "S140" if required else "S106"
            assert [each.code for each in error.diagnostics] == [late]
            assert all(str(_read(each, case)) in str(error) for each in (first, second)[required:])
            assert same(bits(model), before)
            assert torch.equal(case.run(model), logits)
            continue
        assert same(bits(model), bits(wanted)), f"`{first}`, then `{second}`"
        assert torch.equal(case.run(model), case.run(wanted))
        with surgery.disabled(model), surgery.disabled(wanted):
            assert torch.equal(case.run(model), case.run(wanted))
        found = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
        assert found == {name for name, tensor in wanted.named_parameters() if tensor.requires_grad}


def _two(case: Case) -> bool:
    return len(case.program.statements) == 2


def _read(statement: Statement, case: Case) -> Statement:
    return replace(statement, operation=statement.operation.read(zoo.tokenizer(case.model.shape.vocabulary)))


def _is_accepted(case: Case) -> bool:
    base = case.build()
    before = bits(base)
    error = _refusal(case, case.program, base)
    if error is None:
        return True
    assert same(bits(base), before)
    codes = {each.code for each in error.diagnostics}
    assume(codes <= REFUSALS)  # else it does not fit the drawn model, alone or not
    if codes <= {"S103", "S114"}:
        assert all(str(_read(each, case)) in str(error) for each in case.program.statements), "both are named"
    return False


def _refusal(case: Case, program: Program, model: nn.Module) -> PlanError | None:
    try:
        case.apply(program, model)
    except PlanError as error:
        return error
    return None


def _off_means_off(case: Case) -> None:
    model = case.apply()
    randomise(model)
    on = case.run(model)
    with surgery.disabled(model):
        off = case.run(model)
    assert torch.equal(case.run(model), on)
    base = tuple(each for each in case.program.statements if _is_base(each.operation))
    alone = case.apply(Program(base, seed=case.program.seed)) if base else case.build()
    held = dict(alone.named_parameters())
    with torch.no_grad():  # what is trained of the base stays as trained
        for name, tensor in surgery.parameters(model).items():
            if name in held:
                held[name].copy_(tensor)
    assert torch.equal(case.run(alone), off)


def _is_base(operation: Operation) -> bool:
    return operation.phase in ("mask", "quantize") or operation.reshapes()


def _starts_as_nothing(case: Case) -> None:
    model = case.apply()
    on = case.run(model)
    with surgery.disabled(model):
        assert torch.equal(case.run(model), on)
    randomise(model)
    assert not torch.equal(case.run(model), on), "what was attached has no effect"
