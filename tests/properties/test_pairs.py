"""Every verb alone and in every pair keeps what it promises, on drawn models; illegal pairs name both statements."""

from __future__ import annotations

import os
from itertools import combinations, combinations_with_replacement
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import surgery
from surgery.errors import PromiseError
from surgery.language.pairs import pair
from surgery.language.pairs import statements as forms
from surgery.language.program import Program
from surgery.operations import TABLE, lookup
from tests import strategies, zoo
from tests.properties.case import Case, bits, same
from tests.properties.pairs import STATEMENTS, everything_promised_holds, programs

DEEP = pytest.mark.skipif(os.environ.get("HYPOTHESIS_PROFILE") != "deep", reason="an hour: HYPOTHESIS_PROFILE=deep")
OPERATIONS = {verb: found for verb in STATEMENTS if (found := lookup(verb)) is not None}
PAIRS = list(combinations_with_replacement(sorted(STATEMENTS), 2))
# What reshapes a model is planned by studying it several times: with others it is drawn in the hour's run alone.
CHEAP = [pair for pair in PAIRS if not any(OPERATIONS[verb].reshapes() for verb in pair)]


def test_every_verb_is_drawn() -> None:
    """A new verb needs a line in tests/properties/pairs.py."""
    assert STATEMENTS.keys() == TABLE.keys()


def check(verbs: tuple[str, ...], examples: int) -> None:
    @settings(max_examples=examples)
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        model = data.draw(strategies.models(("float64",)))
        everything_promised_holds(Case(model, data.draw(programs(model, verbs))))

    holds()


@pytest.mark.parametrize("verb", sorted(STATEMENTS))
def test_every_verb_alone(verb: str) -> None:
    check((verb,), 2)


def test_some_pairs() -> None:
    @settings(max_examples=max(2, settings().max_examples // 12))
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        verbs = data.draw(st.sampled_from(CHEAP))
        model = data.draw(strategies.models(("float64", "float32")))
        everything_promised_holds(Case(model, data.draw(programs(model, verbs))))

    holds()


@DEEP
@pytest.mark.slow
@pytest.mark.parametrize("verbs", PAIRS, ids=" ".join)
def test_all_pairs(verbs: tuple[str, str]) -> None:
    check(verbs, 4)


@DEEP
@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "bert"])
def test_all_pairs_of_forms_on_transformers_models(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both at once, and one after the other: the same bits and the same outputs. What a program requires and does not
    find in its result is no word on the pair: texts in front of a model that has learnt nothing may cost perplexity."""
    monkeypatch.chdir(tmp_path)
    Path("examples.jsonl").write_text('{"input": "w5", "output": "w6", "text": "w5 w6 w7"}\n')
    base = zoo.tiny(family)
    fed, tokenizer = zoo.inputs(base), zoo.tokenizer(base.config.vocab_size)

    def transformed(program: Program, model: nn.Module | None = None) -> nn.Module | None:
        try:
            return surgery.apply(program, zoo.tiny(family) if model is None else model, tokenizer=tokenizer)
        except PromiseError:
            missed.append(program)
            return None
        except surgery.SurgeryError:
            return None

    missed: list[Program] = []
    fitting = [form for form in forms(TABLE) if transformed(Program((form,))) is not None]
    assert len(fitting) > len(TABLE) - 3
    assert not missed
    for one, other in combinations(fitting, 2):
        wanted = transformed(both := Program((one, other)))
        legal = wanted is not None or both in missed
        assert legal == (pair(one, other).verdict == "+"), f"`{one}` and `{other}`"
        if wanted is None:
            continue
        again = transformed(Program((other,)), transformed(Program((one,))))
        if again is not None:
            assert same(bits(again), bits(wanted)), f"`{one}`, then `{other}`"
            assert torch.equal(zoo.logits(again, fed), zoo.logits(wanted, fed))
