"""Where laws are tried: models and programs drawn by Hypothesis, as wide as each law holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from surgery.language.program import Program, Statement
from surgery.language.selector import Role, Union
from surgery.operations.base import Variant
from surgery.operations.ia3 import Ia3
from surgery.operations.lora import Lora
from surgery.operations.prefix import Prefix
from surgery.operations.train import Train
from tests import strategies
from tests.properties.case import Case
from tests.strategies import Model


@st.composite
def cases(
    draw: st.DrawFn,
    programs: Callable[[Model], st.SearchStrategy[Program]],
    dtypes: tuple[str, ...] = ("float64",),
    **fixed: Any,
) -> Case:
    model = draw(strategies.models(dtypes, **fixed))
    return Case(model, draw(programs(model)))


def one(operation: st.SearchStrategy[Any]) -> Callable[[Model], st.SearchStrategy[Program]]:
    def programs(model: Model) -> st.SearchStrategy[Program]:
        statement = strategies.statements(model, operation)
        return st.builds(lambda made, seed: Program((made,), seed=seed), statement, st.integers(0, 9))

    return programs


def plain_loras(model: Model) -> st.SearchStrategy[Program]:
    """Adapters only, without pissa, which changes the base."""
    return strategies.programs(model, exact=True).map(
        lambda p: Program(tuple(s for s in p.statements if isinstance(s.operation, Lora)), seed=p.seed)
    )


def masked(*operations: Callable[[], st.SearchStrategy[Any]]) -> Callable[[Model], st.SearchStrategy[Program]]:
    def programs(model: Model) -> st.SearchStrategy[Program]:
        statement = strategies.masked(model, st.one_of([operation() for operation in operations]))
        return st.builds(lambda made, seed: Program((made,), seed=seed), statement, st.integers(0, 9))

    return programs


def quantized(model: Model) -> st.SearchStrategy[Program]:
    statement = st.builds(Statement, strategies.quantizes(), st.just(Role("base")))
    pruned = strategies.statements(model, strategies.prunes(ratios=False))
    return st.builds(lambda q, p: Program((q, *p)), statement, st.just(()) | pruned.map(lambda each: (each,)))


def anything(model: Model) -> st.SearchStrategy[Program]:
    return strategies.programs(model)


def from_weights(model: Model) -> st.SearchStrategy[Program]:
    """4-bit weights, and an adapter that starts from some of them."""
    starts: st.SearchStrategy[Any] = st.sampled_from(["pissa", Variant("loftq", 1), Variant("loftq", 3)])
    adapters = st.builds(Lora, rank=st.integers(1, 3), alpha=strategies.numbers(), init=starts)
    quantize = st.builds(Statement, strategies.quantizes(), st.just(Role("base")))
    return st.builds(lambda q, a: Program((q, a)), quantize, strategies.statements(model, adapters))


def budgets(model: Model) -> st.SearchStrategy[Program]:
    budgets = st.builds(Lora, budget=st.sampled_from([0.03, 0.1, 0.25, 0.6, 0.9]))
    return st.builds(lambda made: Program((made,)), strategies.statements(model, budgets))


def kept(model: Model) -> st.SearchStrategy[Program]:
    """Without pissa and loftq, whose base is what their start leaves over."""
    return anything(model).filter(lambda p: not any(getattr(s.operation, "from_weight", False) for s in p.statements))


def exact(model: Model) -> st.SearchStrategy[Program]:
    return strategies.programs(model, exact=True)


def merging(model: Model) -> st.SearchStrategy[Program]:
    return strategies.programs(model, merging=True)


def narrow(model: Model) -> st.SearchStrategy[Program]:
    return st.builds(
        lambda made, seed: Program(tuple(made), seed=seed), strategies.bottlenecks(model), st.integers(0, 9)
    )


def rescaled(model: Model) -> st.SearchStrategy[Program]:
    """IA3, or biases added to what has none, or both."""
    factors = strategies.statements(model, st.just(Ia3()))
    biases = st.just(Statement(Train(add=True), Role("bias")))
    chosen = st.one_of(st.tuples(factors), st.tuples(biases), st.tuples(factors, biases))
    return st.builds(Program, chosen, seed=st.integers(0, 9))


@st.composite
def trained(draw: st.DrawFn, model: Model) -> Program:
    """What of the base is trained, perhaps pruned, beside an adapter."""
    made = draw(strategies.trainings(model))
    if draw(st.booleans()):
        made.append(draw(strategies.statements(model, strategies.loras(exact=True))))
    if draw(st.booleans()):
        made.append(draw(strategies.statements(model, strategies.prunes(ratios=False))))
    return Program(tuple(draw(st.permutations(made))), seed=draw(st.integers(0, 9)))


@st.composite
def optimized(draw: st.DrawFn, model: Model) -> Program:
    made = [Statement(draw(strategies.optimizes()), Union(())), *draw(strategies.trainings(model))]
    return Program(tuple(draw(st.permutations(made))))


def a_text(model: Model) -> st.SearchStrategy[Program]:
    return st.just(Program((Statement(Prefix(positions=3), Role("layers")),)))


FLOATS = ("float64", "float32", "bfloat16")
WIDE = FLOATS[:2]  # where what rounding makes of a whole model is small beside any mistake
ANY = cases(anything)
