"""The law of what a program requires of its result: it is handed over exactly where an independent count says so."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

import surgery
from surgery.language import parse
from surgery.language.program import Program
from surgery.operations.options import Comparison
from surgery.operations.require import Require
from tests.properties.case import Law
from tests.properties.drawn import cases

if TYPE_CHECKING:
    from tests.properties.case import Case
    from tests.strategies import Model

HELD_OUT = Path(__file__).parents[1] / "held-out.jsonl"
REQUIRED = (
    "require trainable {} 1",
    "require trainable {} 1%",
    "require size {} 1 kB",
    "require size {} 1 of base",
    "require zeros {} 1% on ffn.down + attn.o",
    f'require perplexity {{}} 1 using "{HELD_OUT}"',
    f'require perplexity {{}} 1 of base using "{HELD_OUT}"',
)
CHANGES = (
    "prune magnitude {}% on ffn.down",
    "prune random {}% global on ffn.down + attn.o",
    "lora rank 2 on ffn.down ; prune random {}% on attn.o",
    "train norm ; prune magnitude {}% global on ffn.down",
)
# By hand: what the package has is on trial.
TRUE = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
}


def requirements(model: Model) -> st.SearchStrategy[Program]:
    """One requirement, of which the check replaces the bound, beside something that changes what is measured."""
    changes = st.builds(str.format, st.sampled_from(CHANGES), st.sampled_from([0, 37, 90]))
    asked = st.builds(str.format, st.sampled_from(REQUIRED), st.sampled_from(sorted(TRUE)))
    return st.builds("{} ; {}".format, changes, asked).map(parse)


def handed_over_where_it_is_so(case: Case) -> None:
    """Just below what is counted, at it, and just above it."""
    from tests.properties.case import bits, same

    (said,) = (each for each in case.program.statements if isinstance(each.operation, Require))
    rest = tuple(each for each in case.program.statements if each is not said)
    free = case.apply(Program(rest, seed=case.program.seed))
    asked = said.operation
    assert isinstance(asked, Require)
    unit = asked.bound.unit or asked.bound.of
    found = counted(asked.verb, free, case, unit)
    one = counted(asked.verb, case.build(), case, unit) if unit == "base" else 1000 if unit == "kB" else 1
    near = (0.98, 1.02) if asked.verb == "require perplexity" else (0.98, 1.0, 1.02)
    answers = set()
    for factor in near if found else (1.0, 2.0):
        bound = found * factor / one if found else factor - 1
        program = Program((*rest, replace(said, operation=_bounded(asked, bound))), seed=case.program.seed)
        model = case.build()
        before = bits(model)
        wanted = TRUE[asked.bound.relation](found, bound * one)  # a ratio of numbers is rounded
        answers.add(wanted)
        if wanted:
            made = case.apply(program, model)
            assert same(bits(made), bits(free))
            assert surgery.verify(made, example_inputs=(case.model.tokens,)).of("required")[0].status == "holds"
            continue
        with pytest.raises(surgery.SurgeryError) as refused:
            case.apply(program, model)
        assert [each.code for each in refused.value.diagnostics] == ["S502"]
        assert same(bits(model), before), "a result that is refused leaves the model as it was"
    assert len(answers) == 2 or asked.bound.relation in ("==", "!=") or not found, "the bound decides"


def _bounded(asked: Require, bound: float) -> Require:
    return replace(asked, bound=Comparison(asked.bound.relation, bound, asked.bound.unit, asked.bound.of))


@torch.no_grad()
def counted(verb: str, model: Any, case: Case, unit: str) -> float:
    """The measurement, taken from the tensors' own names and the formula alone."""
    if verb == "require trainable":
        wanted = sum(tensor.numel() for tensor in model.parameters() if tensor.requires_grad)
        return wanted / sum(tensor.numel() for tensor in model.parameters()) if unit == "%" else wanted
    if verb == "require size":
        held = {tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in model.state_dict().values()}
        held |= {tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in model.buffers()}
        return sum(held.values())
    if verb == "require zeros":
        names = ("ffn.down.weight", "attention.o.weight")
        read = [tensor for name, tensor in model.state_dict().items() if name.endswith(names)]
        return sum(int((tensor == 0).sum()) for tensor in read) / sum(tensor.numel() for tensor in read)
    losses = []
    for line in HELD_OUT.read_text().splitlines():
        ids = torch.tensor(json.loads(line)["input_ids"])
        logits = case.run(model, ids[None])[0].double()
        losses += [float(F.cross_entropy(logits[place - 1], ids[place])) for place in range(1, len(ids))]
    return math.exp(sum(losses) / len(losses))


LAWS: tuple[Law, ...] = (
    Law(
        "required",
        "a result is handed over where it is as required, by an independent count",
        handed_over_where_it_is_so,
        cases(requirements, ("float64", "float32")),
        3,
    ),
)
