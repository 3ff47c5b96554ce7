"""Merging a transformed model: every place that can be folded becomes plain again, and the others say why not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import TypeVar

from torch import nn

from surgery.compiler.record import ATTRIBUTE, record_of
from surgery.errors import GraphError
from surgery.graph.affine import NotAffine
from surgery.graph.fold import fold
from surgery.graph.module import Rewritten, rewritten

Model = TypeVar("Model", bound=nn.Module)


def merge(model: Model, *, progress: Callable[[str, int, int], None] | None = None) -> Model:
    """Fold what the program attached into the weights, in place; the same object comes back.

    Sums are taken in float32 (float64 for float64 models) and rounded once to the dtype that the weight had. 4-bit
    weights come back at that width. Places that no matrix can stand for keep their graph, reduced where possible.
    A tensor that was tied to another and changes is untied. Error: GraphError S311 when the model was not transformed.
    """
    if record_of(model) is None:
        raise GraphError.of("S311", "the model was not transformed, there is nothing to merge")
    slots: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for parent in model.modules():
        for name, child in parent._modules.items():
            slots[id(child)].append((parent, name))
    places = list(rewritten(model))
    for number, (path, site) in enumerate(places):
        if site.facts is not None:
            _merge_one(site, slots[id(site)])
        else:
            site.settle()
        if progress:
            progress("merge", number + 1, len(places))
    _untie(model)
    if not list(rewritten(model)):
        del model.__dict__[ATTRIBUTE]
    return model


def _merge_one(site: Rewritten, slots: list[tuple[nn.Module, str]]) -> None:
    try:
        plain = fold(site)
    except NotAffine:
        return  # the place keeps its graph: the plan and `unmerged` say which and why
    for parent, name in slots:
        parent._modules[name] = plain


def unmerged(model: nn.Module) -> dict[str, str]:
    """The places that a merge leaves as they are, with the reason."""
    from surgery.graph.fold import affine

    reasons = {}
    for path, site in rewritten(model):
        try:
            affine(site)
        except NotAffine as reason:
            reasons[path] = str(reason)
    return reasons


def _untie(model: nn.Module) -> None:
    """Tell a transformers model that its head no longer shares the embedding's tensor, if so."""
    config = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return
    inside, outside = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    if inside is not None and outside is not None and inside.weight is not outside.weight:
        config.tie_word_embeddings = False  # type: ignore[union-attr]
