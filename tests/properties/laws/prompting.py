"""Laws of what comes in front of the tokens."""

from __future__ import annotations

from dataclasses import replace

import torch

import surgery
from surgery.language.program import Program, Statement
from surgery.language.selector import Role
from surgery.operations.base import Operation, Variant
from surgery.operations.instruct import Instruct
from surgery.operations.prefix import Prefix
from surgery.operations.prompt import Prompt
from surgery.operations.ptuning import Ptuning
from surgery.operations.quantize import Quantize
from tests.properties import hand
from tests.properties.case import Case, Law, randomise
from tests.properties.drawn import a_text, anything, cases


def soft_equals_hard(case: Case) -> None:
    """A prefix that starts from a text is that text in front: same logits, positions and mask included."""
    words = torch.tensor([7, 3, 11])
    text = " ".join(f"w{int(word)}" for word in words)
    prefix = Prefix(init=Variant("text", text))
    model = case.apply(Program((Statement(prefix, Role("layers")),)))
    prompted = torch.cat((words.expand(2, -1), case.model.tokens), dim=1)
    wanted = case.run(case.build(), prompted)[:, len(words) :]
    error = ((case.run(model) - wanted).abs().max() / wanted.abs().max()).item()
    assert error <= 1e-10, f"off by {error:.1e}"
    plain = case.run(case.build())
    assert (plain - wanted).abs().max() > 1e-3 * wanted.abs().max(), "the text has no effect"


def texts_are_read_first(case: Case) -> None:
    """An instruction, kept or not, and a prompt that starts from a text are that text in front; both are one text."""
    first, second = "w7 w3 w11", "w2 w9"
    instruct = Instruct(text=first)
    ways: list[tuple[str, tuple[Operation, ...]]] = [
        (first, (instruct,)),
        (first, (replace(instruct, cached=True),)),
        (first, (Prompt(init=Variant("text", first)),)),
        (f"{second} {first}", (instruct, Prompt(init=Variant("text", second)))),
    ]
    for text, operations in ways:
        words = torch.tensor([int(word[1:]) for word in text.split()])
        model = case.apply(Program(tuple(Statement(each, Role("layers")) for each in operations)))
        prompted = torch.cat((words.expand(2, -1), case.model.tokens), dim=1)
        wanted = case.run(case.build(), prompted)[:, len(words) :]
        error = ((case.run(model) - wanted).abs().max() / wanted.abs().max()).item()
        assert error <= 1e-10, f"{operations} off by {error:.1e}"


def made_prompts_mean_their_formula(case: Case) -> None:
    """P-tuning is the prompt that torch's own layers make of its tensors; a merge keeps just that, to the bit."""
    for via in (Variant("mlp", 5), Variant("lstm", 3)):
        made = case.apply(Program((Statement(Ptuning(version="v1", positions=4, via=via), Role("layers")),)))
        randomise(made)
        held = {path.rpartition("ptuning_")[2]: tensor for path, tensor in surgery.parameters(made).items()}
        plain = case.apply(Program((Statement(Prompt(positions=4), Role("layers")),)))
        with torch.no_grad():
            (prompt,) = surgery.parameters(plain).values()
            prompt.copy_(hand.made_prompt(held))
        wanted, got = case.run(plain), case.run(made)
        assert (got - wanted).abs().max() <= 1e-10 * wanted.abs().max()
        surgery.merge(made)
        assert torch.equal(case.run(made), got)
        assert len(surgery.parameters(made)) == 1


def causal_and_independent(case: Case) -> None:
    """Later tokens change no earlier logits, and rows of a batch do not see one another."""
    model = case.apply()
    randomise(model)
    wanted = case.run(model)
    tokens = case.model.tokens.clone()
    tokens[:, -1] = (tokens[:, -1] - 3 + 1) % (case.model.shape.vocabulary - 3) + 3
    # `compute fp32` rounds as float32 does, and differently for another number of rows.
    slack = (1e-5 if case.has(Quantize) else 1e-9) * wanted.abs().max()
    assert (case.run(model, tokens) - wanted)[:, :-1].abs().max() <= slack
    assert (case.run(model, tokens) - wanted)[:, -1].abs().max() > slack
    assert (case.run(model, case.model.tokens[:1]) - wanted[:1]).abs().max() <= slack


LAWS: tuple[Law, ...] = (
    Law("causal", "no token sees a later one or another row", causal_and_independent, cases(anything), 2),
    Law(
        "texts",
        "instructions and prompts from a text are that text",
        texts_are_read_first,
        cases(a_text, positions="rotary") | cases(a_text, positions="learned"),
        2,
    ),
    Law(
        "made prompts",
        "networks make the prompts they should, and fold",
        made_prompts_mean_their_formula,
        cases(a_text),
    ),
    Law(
        "soft equals hard",
        "a prefix from a text is that text",
        soft_equals_hard,
        cases(a_text, positions="rotary") | cases(a_text, positions="learned"),
    ),
)
