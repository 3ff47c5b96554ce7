"""A gated prefix is nothing at first, off is off; prefixes are switched by name, and stand beside other methods."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch

import surgery
from tests import studied, zoo
from tests.texts import WAYS, ids_of


@torch.no_grad()
@pytest.mark.parametrize("name", [*zoo.FAMILIES, *zoo.PLAIN])
def test_gated_is_nothing_at_first_and_something_later(name: str) -> None:
    """Promise: identity at the start, to the bit; and the gate opens."""
    specimen = zoo.specimen(name)
    before = specimen.logits()
    model = studied.apply("prefix 6 gated", name, specimen.model)
    assert torch.equal(specimen.logits(), before)
    for path, parameter in surgery.parameters(model).items():
        if path.endswith("prefix_gate"):
            parameter.fill_(0.5)
    assert not torch.allclose(specimen.logits(), before, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "base"),
    [
        pytest.param(name, base, marks=() if turn % 5 == 0 else pytest.mark.slow)
        for turn, (name, base) in enumerate(
            product(
                [*zoo.FAMILIES, *zoo.PLAIN],
                ["quantize base nf4", "quantize base int8", "prune magnitude 50% on attn + ffn"],
            )
        )
    ],
)
def test_gated_is_nothing_over_other_bases(name: str, base: str) -> None:
    """Promise: identity at the start, to the bit, over codes and pruned weights, in training as in evaluation."""
    alone, gated = zoo.specimen(name, dtype=torch.float32), zoo.specimen(name, dtype=torch.float32)
    studied.apply(base, name, alone.model)
    studied.apply(f"{base}; prefix 6 gated", name, gated.model)
    for training in (False, True):
        found = []
        for specimen in (alone, gated):
            specimen.model.train(training)
            torch.manual_seed(0)  # dropout is there for both
            found.append(specimen.logits())
        assert torch.equal(*found)
    for path, parameter in surgery.parameters(gated.model).items():
        if path.endswith("prefix_gate"):
            parameter.fill_(0.5)
    assert not torch.allclose(gated.logits(), alone.logits(), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("program", ["prefix 6", "prefix 6 gated", "prefix 6 via mlp 8", WAYS["prefix"]])
@pytest.mark.parametrize("name", [*zoo.FAMILIES, *zoo.PLAIN])
def test_off_means_off(name: str, program: str) -> None:
    """Promise: switched off, the base comes back to the bit, positions included; and the prefix, switched on again."""
    specimen = zoo.specimen(name)
    before = specimen.logits()
    model = studied.apply(program, name, specimen.model, ids_of)
    on = specimen.logits()
    assert torch.equal(on, before) == ("gated" in program)
    with surgery.disabled(model):
        assert torch.equal(specimen.logits(), before)
    assert torch.equal(specimen.logits(), on)


@torch.no_grad()
def test_two_prefixes_by_name() -> None:
    """Promise: each name is switched alone, and with both on the tokens stand behind both."""
    x = zoo.tokens(50, 2, 7)
    both = studied.apply("prefix 4 as a\nprefix 3 as b", "gpt2", zoo.tiny("gpt2"))
    together = both(input_ids=x).logits
    for name, program in {"a": "prefix 4 as a", "b": "prefix 3 as b"}.items():
        surgery.activate(both, name)
        alone = studied.apply(program, "gpt2", zoo.tiny("gpt2"))
        assert torch.equal(both(input_ids=x).logits, alone(input_ids=x).logits)
        assert not torch.equal(both(input_ids=x).logits, together)
    surgery.activate(both)
    assert torch.equal(both(input_ids=x).logits, together)


@torch.no_grad()
def test_beside_other_methods() -> None:
    """Peers can train one kind of method at a time; here statements meet in one attention, traced or not."""
    for name in ("llama", "byhand", "nano"):
        specimen = zoo.specimen(name)
        program = "prefix 4\nlora rank 2 on attn.q,v\nprune magnitude 50% on ffn\nquantize ffn nf4"
        base = zoo.specimen(name)
        studied.apply("prune magnitude 50% on ffn\nquantize ffn nf4", name, base.model)
        model = studied.apply(program, name, specimen.model)
        with surgery.disabled(model):
            assert torch.equal(specimen.logits(), base.logits())
        copied = copy.deepcopy(model)
        assert torch.equal(zoo.logits(copied, specimen.inputs), specimen.logits())
