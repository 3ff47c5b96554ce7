"""LoRA as PEFT writes it: of linear maps, lookups and stacks of experts; parts of one matrix become one adapter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery.checkpoint.interchange.peft_place import ROOT, Adapter, Place, cannot, targets
from surgery.graph.draft import Draft


def lora(model: nn.Module, places: Sequence[Place]) -> Adapter:
    """Low-rank adapters; PEFT's scale is alpha / r, whatever ours was called. Errors: S451."""
    _check(places)
    stacked = [place for place in places if place.part.kind == "experts"]
    single = [place for place in places if place.part.kind != "experts"]
    maps = _grouped(place for place in single if _is_plain(place))
    others = _grouped(place for place in single if not _is_plain(place))
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    tensors: dict[str, Tensor] = {}
    dora = places[0].operation.dora
    for path, here in {**maps, **others}.items():
        a, b, scale = _joined(here)
        name = path if path in maps else f"{path}.{here[0].part.parameter}"
        ranks[name], alphas[name] = a.shape[0], scale * a.shape[0]
        lookup = here[0].part.kind == "lookup"
        names = ("lora_embedding_A", "lora_embedding_B") if lookup else ("lora_A.weight", "lora_B.weight")
        tensors.update({f"{ROOT}{path}.{name}": tensor for name, tensor in zip(names, (a, b), strict=True)})
        if dora:
            tensors[f"{ROOT}{path}.lora_magnitude_vector"] = _magnitude(here)
    for path, here in _grouped(stacked).items():
        for parameter, prefix, group in _nested(model, path, here):
            a, b, scale = _stacked(group)
            name = f"{path}.{parameter}"
            ranks[name], alphas[name] = a.shape[1], scale * a.shape[1]
            tensors[f"{ROOT}{prefix}.lora_A.weight"] = a.flatten(0, 1).contiguous()
            tensors[f"{ROOT}{prefix}.lora_B.weight"] = b.permute(1, 2, 0).flatten(1).contiguous()
    (rank, _), (alpha, _) = (Counter(each.values()).most_common(1)[0] for each in (ranks, alphas))
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {path: each for path, each in ranks.items() if each != rank},
        "alpha_pattern": {path: each for path, each in alphas.items() if each != alpha},
        "target_modules": targets(model, maps) if maps else [],
        "target_parameters": sorted(set(ranks) - set(maps)) or None,
        "lora_dropout": places[0].operation.dropout,
        "use_dora": dora,
        "use_rslora": False,
        "fan_in_fan_out": any(place.part.transposed for here in maps.values() for place in here),
        "bias": "none",
    }
    return Adapter(config, tensors, frozenset(maps))


def _check(places: Sequence[Place]) -> None:
    """Errors: S451 for what one configuration cannot say of all places, or PEFT of none."""
    for place in places:
        if place.operation.from_weight:
            raise cannot(
                f"`{place.step.statement}` has changed the base's weights, and an adapter goes on a base as it was",
                "`surgery merge`, and share the merged model",
            )
    for what, said in (("dropout", "one dropout"), ("dora", "is DoRA or not")):
        if len({getattr(place.operation, what) for place in places}) > 1:
            raise cannot(f"one adapter of PEFT has {said}, everywhere", "give the statements names")
    parameters = [place for place in places if not _is_plain(place)]
    conv = [place for place in places if place.part.transposed and place.part.kind != "experts"]
    if parameters and (conv or places[0].operation.dora or places[0].operation.dropout):
        said = f"{conv[0].part.path} is stored transposed" if conv else f"`{places[0].step.statement}`"
        raise cannot(
            f"PEFT adapts {parameters[0].part.path} as a bare parameter, and one adapter cannot hold both: {said}",
            "give the statements names, and leave out dora and dropout",
        )


def _is_plain(place: Place) -> bool:
    """Whether PEFT has a wrapper for such modules; of any other, as routers are, it adapts the parameter."""
    original = place.module.original
    return isinstance(original, nn.Linear | nn.Embedding) or type(original).__name__ == "Conv1D"


def _grouped(places: Iterable[Place]) -> dict[str, list[Place]]:
    groups: dict[str, list[Place]] = {}
    for place in places:
        groups.setdefault(place.part.path, []).append(place)
    return groups


def _joined(places: Sequence[Place]) -> tuple[Tensor, Tensor, float]:
    """A, B and scale of all parts of one projection: A's one upon the other, B's in a row of blocks."""
    scale = places[0].operation.factor
    pairs = [(place.tensor("lora_A"), place.tensor("lora_B")) for place in places]
    if len(places) == 1 and places[0].part.channels is None:
        return pairs[0][0].contiguous(), pairs[0][1].contiguous(), scale
    a = torch.cat([first for first, _ in pairs])
    b = torch.zeros(places[0].part.shape[0], a.shape[0], dtype=a.dtype)
    start = 0
    for place, (first, second) in zip(places, pairs, strict=True):
        b[place.rows, start : start + first.shape[0]] = second * (place.operation.factor / scale)
        start += first.shape[0]
    return a, b, scale


def _stacked(places: Sequence[Place]) -> tuple[Tensor, Tensor, float]:
    """The same of a stack: A (experts, rank, in) and B (experts, out, rank)."""
    scale = places[0].operation.factor
    parameter = places[0].part.parameter
    pairs = [(place.tensor(f"lora_A_{parameter}"), place.tensor(f"lora_B_{parameter}")) for place in places]
    if len(places) == 1 and places[0].part.channels is None:
        return *pairs[0], scale
    a = torch.cat([first for first, _ in pairs], dim=1)
    b = torch.zeros(a.shape[0], places[0].part.shape[1], a.shape[1], dtype=a.dtype)
    start = 0
    for place, (first, second) in zip(places, pairs, strict=True):
        b[:, place.rows, start : start + first.shape[1]] = second * (place.operation.factor / scale)
        start += first.shape[1]
    return a, b, scale


def _nested(model: nn.Module, path: str, places: Sequence[Place]) -> list[tuple[str, str, list[Place]]]:
    """Parameter, PEFT's name for its wrapper and the places there: PEFT wraps one parameter in the wrapper of the
    next, in the order in which the module has them."""
    groups: dict[str, list[Place]] = {}
    for name in (name for name in model.get_submodule(path)._parameters):
        here = [place for place in places if place.part.parameter == name]
        if here:
            groups[name] = here
    outside = reversed(range(len(groups)))
    return [
        (name, path + depth * ".base_layer", here) for depth, (name, here) in zip(outside, groups.items(), strict=True)
    ]


def _magnitude(places: Sequence[Place]) -> Tensor:
    """Norms of all rows: the trained ones, and of rows that no statement acts on the base's own."""
    module, part = places[0].module, places[0].part
    draft = Draft(module, part.path, part.parameter)
    first = places[0].tensor("lora_magnitude")
    magnitude: Tensor = torch.linalg.vector_norm(draft.evaluate(draft.captured.weight).to(first.dtype), dim=1)
    for place in places:
        magnitude[place.rows] = place.tensor("lora_magnitude")
    return magnitude


def scale_at(made: Adapter, path: str) -> Any:
    """alpha / r of one wrapped module."""
    rank, alpha = made.config["rank_pattern"], made.config["alpha_pattern"]
    return alpha.get(path, made.config["lora_alpha"]) / rank.get(path, made.config["r"])
