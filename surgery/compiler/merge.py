"""Merging a transformed model: every place that can be folded becomes plain again, and the others say why not."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TypeVar

from torch import nn

from surgery.compiler.apply import Tell
from surgery.compiler.cost import Cost
from surgery.compiler.plan import Plan, Step
from surgery.compiler.record import ATTRIBUTE, record_of, remembered
from surgery.errors import GraphError
from surgery.graph.affine import NotAffine
from surgery.graph.fold import fold
from surgery.graph.module import Rewritten, rewritten

Model = TypeVar("Model", bound=nn.Module)


def merge(model: Model, *, tell: Tell = lambda amount: None) -> Model:
    """Fold what the program attached into the weights, in place; the same object comes back.

    Sums are taken in float32 (float64 for float64 models) and rounded once to the dtype that the weight had. 4-bit
    weights come back at that width. Places that no matrix can stand for keep their graph, reduced where possible.
    A tensor that was tied to another and changes is untied. Error: GraphError S311 when the model was not transformed.
    """
    record = record_of(model)
    if record is None:
        raise GraphError.of("S311", "the model was not transformed, there is nothing to merge")
    slots: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for parent in model.modules():
        for name, child in parent._modules.items():
            slots[id(child)].append((parent, name))
    for _, site in list(rewritten(model)):
        if site.facts is not None:
            _merge_one(site, slots[id(site)])
        else:
            site.settle()
        tell(1)
    _untie(model)
    left = _what_is_left(record.plan, model)
    if left.steps:
        model.__dict__[ATTRIBUTE] = remembered(left, model)
    else:
        del model.__dict__[ATTRIBUTE]
    return model


def _merge_one(site: Rewritten, slots: list[tuple[nn.Module, str]]) -> None:
    try:
        plain = fold(site)
    except NotAffine:
        return  # the place keeps its graph, and its statements stay in the model's plan
    for parent, name in slots:
        parent._modules[name] = plain


def _what_is_left(plan: Plan, model: nn.Module) -> Plan:
    """The plan whose result the merged model is: the steps and parts that still have a graph."""
    steps = []
    for step in plan.steps:
        parts = tuple(part for part in step.parts if _stands(model.get_submodule(part.path)))
        if parts:
            statement = replace(step.statement, operation=step.operation.folded())
            steps.append(Step(statement, parts))
    program = replace(plan.program, statements=tuple(step.statement for step in steps))
    return replace(plan, program=program, steps=tuple(steps), cost=_cost(plan, model, len(steps)), warnings=())


def _cost(plan: Plan, model: nn.Module, steps: int) -> Cost:
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    size = sum(t.numel() * t.element_size() for t in tensors)
    return Cost(plan.cost.parameters, size, size, (0,) * steps, (0,) * steps)


def _stands(module: nn.Module) -> bool:
    """Whether a place is still rewritten, itself or in the attention call that it hands out."""
    return isinstance(module, Rewritten) or any(
        isinstance(child, Rewritten) and child.facts is None for child in module.children()
    )


def _untie(model: nn.Module) -> None:
    """Tell a transformers model that its head no longer shares the embedding's tensor, if so."""
    config = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return
    inside, outside = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    if inside is not None and outside is not None and inside.weight is not outside.weight:
        config.tie_word_embeddings = False  # type: ignore[union-attr]
