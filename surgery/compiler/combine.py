"""Low-rank adapters of one model combined into a new one: a statement of the model's program like any other."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from surgery.anatomy.parts import Part
from surgery.compiler import mixing
from surgery.compiler.drafts import Drafts
from surgery.compiler.plan import Plan, Step
from surgery.compiler.record import ATTRIBUTE, record_of
from surgery.compiler.switch import active, check_names, names, refuse_routed, set_off
from surgery.errors import GraphError
from surgery.graph import entry
from surgery.graph.module import HOOKS
from surgery.graph.site import Site, seed_of
from surgery.language.program import Statement
from surgery.language.selector import Difference, Glob, Intersection, Selector, Union
from surgery.operations.lora import Lora, magnitude_ratio

Model = TypeVar("Model", bound=nn.Module)
Method = Literal["linear", "svd", "ties", "dare"]


@dataclass(frozen=True)
class Source:
    """One adapter at one part: its low-rank product, all of its change where that is no low-rank product, its share.

    site: as the adapter's statement sees it. index: of its step in the plan.
    """

    index: int
    site: Site
    step: Step
    share: float

    @cached_property
    def channels(self) -> dict[int, None]:
        """Output channels that the adapter acts on, in order."""
        part = self.site.part
        return dict.fromkeys(_listed(((0, part.shape[0]),) if part.channels is None else part.channels))

    @property
    def operation(self) -> Lora:
        operation = self.step.operation.at(self.site.part)
        assert isinstance(operation, Lora)
        return operation

    def factors(self) -> tuple[Tensor, Tensor]:
        """B (out, rank), with the scale in it, and A (rank, in)."""
        a, b = self.site.data("lora_A").detach(), self.site.data("lora_B").detach()
        return b * self.operation.factor, a

    def delta(self) -> Tensor:
        """By how much the adapter changes the weight: (out, in) of its own channels."""
        b, a = self.factors()
        if not self.operation.dora:
            return b @ a
        m, weight = self.site.data("lora_magnitude").detach(), self.site.evaluate(self.site.own_rows(self.site.weight))
        weight = weight.to(a.dtype)
        ratio = magnitude_ratio(m, weight, a, b, 1.0).unsqueeze(1)
        return (ratio - 1) * weight + ratio * (b @ a)


@dataclass(frozen=True)
class Place:
    """Channels of one tensor and the adapters that act on all of them."""

    part: Part
    sources: tuple[Source, ...]

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(source.index for source in self.sources)

    def rows(self, source: Source, value: Tensor) -> Tensor:
        """The place's channels of a tensor over the source's."""
        if self.part.channels == source.site.part.channels:
            return value
        rows = {channel: row for row, channel in enumerate(source.channels)}
        return value[torch.tensor([rows[channel] for channel in _listed(self.part.channels or ())])]


def combine(
    model: Model,
    shares: Mapping[str, float],
    name: str,
    method: Method = "linear",
    *,
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> Model:
    """Make a new adapter `name` of the lora adapters that `shares` names, each with its share; the model comes back.

        surgery.combine(model, {"french": 0.7, "german": 0.3}, name="both")
        surgery.activate(model, "both")

    What is combined is what each adapter adds to the weight, D = s B A, whatever its rank and scale:
    linear: the sum of w D, exactly; the ranks add up (PEFT calls this `cat`).
    svd: the best approximation of that sum with a rank of `rank`.
    ties: trimmed to `density`, one sign for each entry, the mean of those that have it (Yadav et al. 2023).
    dare: entries dropped with the probability 1 - `density`, the others divided by it, then the sum (Yu et al. 2024).
    ties and dare give full matrices, of which the best approximation with a rank of `rank` is kept. `rank` is the
    largest of the sources' there when it is not given; the plan's warnings say where most is lost. seed: for dare.

    The new adapter is off until you activate it, is trained and saved like any other, and is a statement of the
    model's program: `lora rank 16 on attn as both`, one for each rank. Its sources stay as they are.
    Errors: GraphError S310 for an unknown name, S375 inside of `surgery.route`, S378 for what cannot be combined.
    """
    refuse_routed(model)
    check_names(model, shares)
    _refuse_settings(model, shares, name, method, rank, density)
    record = record_of(model)
    assert record is not None, "a model with adapters was transformed"
    plan = record.plan
    drafts = Drafts(model, False, plan.program.seed)
    places = _places(plan, shares, drafts)
    made = [_mixed(place, method, rank, density, seed) for place in places]
    steps = _steps(plan, name, places, [a.shape[0] for _, a, _ in made])
    factors = {_key(place.part): (b, a) for place, (b, a, _) in zip(places, made, strict=True)}
    for step in steps:
        for part in step.parts:
            site = drafts.site(step, part)
            step.operation.at(part).rewrite(site)
            b, a = factors[_key(part)]
            site.data("lora_A").data.copy_(a)
            site.data("lora_B").data.copy_(b)
    off = names(model) - set(active(model))
    _install(model, drafts, {place.part.path for place in places})
    entry.install(model, plan.anatomy.parts)
    model.__dict__[ATTRIBUTE] = replace(record, plan=_grown(plan, steps, drafts, _lost(name, places, made)))
    set_off(model, off | {name})
    return model


def _refuse_settings(
    model: nn.Module, shares: Mapping[str, float], name: str, method: str, rank: int | None, density: float | None
) -> None:
    wrong = None
    if method not in get_args(Method):
        wrong = f"no method `{method}`", f"it is one of {', '.join(get_args(Method))}"
    elif not shares or not all(math.isfinite(share) for share in shares.values()):
        wrong = "every adapter needs a share that is a number", '`{"french": 0.7, "german": 0.3}`'
    elif not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) or name == "default":
        wrong = f"an adapter cannot be called `{name}`", "letters, digits and `_`, as after `as` in a program"
    elif name in names(model):
        wrong = f"the model has an adapter `{name}` already", "choose another name"
    elif rank is not None and (method == "linear" or rank < 1):
        wrong = f"rank {rank} does not go with method `{method}`", "svd, ties and dare take a rank of at least 1"
    elif (density is None) == (method in ("ties", "dare")):
        wrong = (
            f"`density` {'is missing for' if density is None else 'does not go with'} method `{method}`",
            ("ties and dare take the share of the entries that stay, 0.2 for example"),
        )
    elif density is not None and not 0 < density <= 1:
        wrong = f"density {density} is no share of the entries", "above 0, and at most 1"
    if wrong is not None:
        raise GraphError.of("S378", wrong[0], help=wrong[1])


def _places(plan: Plan, shares: Mapping[str, float], drafts: Drafts) -> list[Place]:
    """Where the adapters are, those on common channels together. Errors: GraphError S378 for what is not lora."""
    groups: dict[tuple[str, str], list[Source]] = {}
    for index, step in enumerate(plan.steps):
        name = step.statement.name or "default"
        if name not in shares:
            continue
        for part in step.parts:
            if not isinstance(step.operation, Lora) or part.kind not in ("projection", "lookup"):
                raise GraphError.of(
                    "S378",
                    f"`{step.statement}` adds no low-rank matrix at {part.path}, and cannot be combined",
                    step.statement.span,
                    help="combine adapters that `lora` made on linear maps and lookups",
                )
            source = Source(index, drafts.site(step, part), step, float(shares[name]))
            groups.setdefault((part.path, part.parameter), []).append(source)
    return [place for group in groups.values() for place in _atoms(group)]


def _atoms(group: Sequence[Source]) -> list[Place]:
    """The tensor's channels, those with the same sources as one place. Errors: GraphError S378, as `_places`."""
    if len({source.site.part.channels for source in group}) == 1:
        return [Place(group[0].site.part, tuple(group))]
    sets: dict[tuple[int, ...], list[int]] = {}
    for channel in range(group[0].site.part.shape[0]):
        here = tuple(i for i, source in enumerate(group) if channel in source.channels)
        if here:
            sets.setdefault(here, []).append(channel)
    places = [Place(_part(group, here, channels), tuple(group[i] for i in here)) for here, channels in sets.items()]
    if len({place.part.name for place in places}) < len(places):
        raise GraphError.of(
            "S378",
            f"the adapters overlap at {group[0].site.part.path} in parts that have no names of their own",
            help="combine adapters that act on the same roles",
        )
    return places


def _part(group: Sequence[Source], here: tuple[int, ...], channels: list[int]) -> Part:
    """The part with just these channels: a source's own, or a nameless one."""
    parts = [group[i].site.part for i in here]
    for part in parts:
        if part.channels is None and len(channels) == part.shape[0]:
            return part
        if part.channels is not None and _listed(part.channels) == channels:
            return part
    runs: list[tuple[int, int]] = []
    for channel in channels:
        joins = bool(runs) and runs[-1][1] == channel
        runs[-1 if joins else len(runs) :] = [(runs[-1][0] if joins else channel, channel + 1)]
    return replace(parts[0].whole(), channels=tuple(runs))


def _listed(runs: Iterable[tuple[int, int]]) -> list[int]:
    return [channel for start, stop in runs for channel in range(start, stop)]


def _key(part: Part) -> tuple[object, ...]:
    return part.path, part.parameter, part.channels


def _mixed(
    place: Place, method: Method, rank: int | None, density: float | None, seed: int
) -> tuple[Tensor, Tensor, float]:
    """B, A and the share of the squared norm that their rank keeps."""
    with torch.no_grad():
        shares = [source.share for source in place.sources]
        wanted = rank or max(source.operation.r for source in place.sources)
        dora = next((source for source in place.sources if source.operation.dora), None)
        if dora is not None and method == "linear":
            raise GraphError.of(
                "S378",
                f"`{dora.step.statement}` changes {place.part.path} by more than a low-rank matrix",
                dora.step.statement.span,
                help='take the method "svd" with a rank',
            )
        if method in ("linear", "svd") and dora is None:
            pairs = [(place.rows(s, b) * s.share, a) for s in place.sources for b, a in [s.factors()]]
            b, a = torch.cat([b for b, _ in pairs], 1), torch.cat([a for _, a in pairs])
            return (*_narrow(b, a), 1.0) if method == "linear" else mixing.truncated(b, a, min(wanted, b.shape[1]))
        deltas = [place.rows(source, source.delta()) for source in place.sources]
        if method == "ties":
            delta = mixing.ties(deltas, shares, density or 1.0)
        elif method == "dare":
            generator = torch.Generator().manual_seed(seed_of(seed, place.part.path, "dare", place.part.channels))
            delta = mixing.dare(deltas, shares, density or 1.0, generator)
        else:
            delta = mixing.weighted_sum(deltas, shares)
        return mixing.best(delta, min(wanted, *delta.shape))


def _narrow(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with a rank that a matrix of its shape can have."""
    if b.shape[1] <= min(b.shape[0], a.shape[1]):
        return b, a
    if a.shape[1] <= b.shape[0]:
        return b @ a, torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
    return torch.eye(b.shape[0], dtype=b.dtype, device=b.device), b @ a


def _steps(plan: Plan, name: str, places: Sequence[Place], ranks: Sequence[int]) -> list[Step]:
    """One statement for each rank of each set of sources."""
    groups: dict[tuple[tuple[int, ...], int], list[Part]] = {}
    for place, rank in zip(places, ranks, strict=True):
        groups.setdefault((tuple(dict.fromkeys(place.steps)), rank), []).append(place.part)
    sets = [steps for steps, _ in groups]
    every = {index for steps in sets for index in steps}
    found = []
    for (steps, rank), parts in groups.items():
        selector = _selector([plan.steps[i].statement.selector for i in steps], [])
        if any(other != steps for other in sets):
            others = [plan.steps[i].statement.selector for i in sorted(every - set(steps))]
            selector = _selector([plan.steps[i].statement.selector for i in steps], others)
        if sets.count(steps) > 1:  # several ranks
            selector = Intersection(selector, _any([Glob(path) for path in dict.fromkeys(p.path for p in parts)]))
        found.append(Step(Statement(Lora(rank=rank), selector, name), tuple(parts)))
    return sorted(found, key=lambda step: str(step.statement))


def _selector(wanted: Sequence[Selector], unwanted: Sequence[Selector]) -> Selector:
    """What all of these mean and none of the others does."""
    first, *rest = dict.fromkeys(wanted)
    for other in rest:
        first = Intersection(first, other)
    cut = [each for each in dict.fromkeys(unwanted) if each not in wanted]
    return Difference(first, _any(cut)) if cut else first


def _any(items: Sequence[Selector]) -> Selector:
    return items[0] if len(items) == 1 else Union(tuple(items))


def _install(model: nn.Module, drafts: Drafts, paths: Iterable[str]) -> None:
    """Put the finished drafts in; a place keeps its mode and the hooks that somebody hung on it."""
    before = {path: model.get_submodule(path) for path in paths}
    for draft in drafts:
        draft.finish()
    for draft in drafts:
        draft.install(model)
    for path, module in before.items():
        made = model.get_submodule(path).train(module.training)
        for hooks in HOOKS:
            made.__dict__[hooks] = module.__dict__[hooks]


def _grown(plan: Plan, steps: Sequence[Step], drafts: Drafts, lost: Sequence[str]) -> Plan:
    """The plan with these steps at its end."""
    added, sizes = [], []
    for step in steps:
        tensors = [drafts.site(step, part).data(which) for part in step.parts for which in ("lora_A", "lora_B")]
        added.append(sum(tensor.numel() for tensor in tensors))
        sizes.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
    cost = plan.cost
    cost = replace(
        cost,
        bytes_after=cost.bytes_after + sum(sizes),
        added=(*cost.added, *added),
        bytes=(*cost.bytes, *sizes),
        trained=(*cost.trained, *(0,) * len(steps)) if cost.trained else (),
    )
    program = replace(plan.program, statements=(*plan.program.statements, *(step.statement for step in steps)))
    return replace(plan, program=program, steps=(*plan.steps, *steps), cost=cost, warnings=(*plan.warnings, *lost))


def _lost(name: str, places: Sequence[Place], made: Sequence[tuple[Tensor, Tensor, float]]) -> list[str]:
    """What to warn of: how much of the combined change does not fit into the rank, where most is lost."""
    kept, rank, path = min(
        (kept, a.shape[0], place.part.path) for place, (_, a, kept) in zip(places, made, strict=True)
    )
    if kept > 1 - 1e-6:
        return []
    return [f"`{name}` is cut to rank {rank}: it keeps {kept:.1%} of the combined change at {path}, and more elsewhere"]
