"""What a law is tried on: a model to be built and a program for it, and what many laws do with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import surgery
from surgery.compiler.plan import Plan
from surgery.graph.module import Rewritten, rewritten
from surgery.language.program import Program
from tests import zoo
from tests.reference_decoder import ReferenceDecoder
from tests.strategies import Model


@dataclass(frozen=True)
class Case:
    """A model to be built, and a program for it."""

    model: Model
    program: Program

    def build(self) -> ReferenceDecoder:
        return self.model.build()

    def apply(self, program: Program | None = None, model: nn.Module | None = None) -> Any:
        """A fresh model under the program."""
        return surgery.apply(
            self.program if program is None else program,
            self.build() if model is None else model,
            example_inputs=(self.model.tokens,),
            tokenizer=zoo.tokenizer(self.model.shape.vocabulary),
        )

    def plan(self, program: Program | None = None, model: nn.Module | None = None) -> Plan:
        return surgery.plan(
            self.program if program is None else program,
            self.build() if model is None else model,
            example_inputs=(self.model.tokens,),
            tokenizer=zoo.tokenizer(self.model.shape.vocabulary),
        )

    def run(self, model: nn.Module, tokens: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            return model(self.model.tokens if tokens is None else tokens)

    def has(self, *operations: type) -> bool:
        return any(isinstance(statement.operation, operations) for statement in self.program.statements)


@dataclass(frozen=True)
class Law:
    """name: what bugs refer to. says: the law. cases: where it is tried. cost: 1, or more for slow checks."""

    name: str
    says: str
    check: Callable[[Case], None]
    cases: st.SearchStrategy[Case] = field(repr=False)
    cost: int = 1


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Random values for everything trained, as large as the base; they come back too."""
    tensors = surgery.parameters(model)
    for name, parameter in tensors.items():
        draw = torch.randn(parameter.shape, generator=zoo.seeded(seed, name), dtype=torch.float64)
        if "magnitude" in name or "ia3" in name or name.endswith((".weight", ".bias")):
            # Norms and factors are about what they start as, and so are the base's own tensors, whose zeros stay.
            parameter.mul_((1 + 0.2 * draw).to(parameter.dtype))
        else:
            parameter.copy_(draw * (parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0))
    return tensors


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor, copied."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def case_loss(model: nn.Module, case: Case) -> Tensor:
    logits = model(case.model.tokens)
    return (logits * torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype)).square().mean()


def sites(model: nn.Module) -> list[Rewritten]:
    return [module for _, module in rewritten(model)]
