"""Merging a transformed model: every place that can be folded becomes plain again, and the others say why not."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from torch import nn

from surgery.anatomy.parts import Part
from surgery.compiler.apply import Tell
from surgery.compiler.cost import Cost
from surgery.compiler.plan import Plan, Step
from surgery.compiler.record import ATTRIBUTE, Record, record_of, remembered
from surgery.compiler.requantize import has_codes
from surgery.compiler.some import fold_some, refuse_dependent
from surgery.compiler.switch import RESTED, check_names, names, refuse_routed, rest
from surgery.compiler.training import declare, trained
from surgery.compiler.unmerge import before, keep_changes
from surgery.errors import GraphError
from surgery.graph import once
from surgery.graph.affine import NotAffine
from surgery.graph.edge import CHILD, Edge
from surgery.graph.module import Rewritten, added_parameters, rewritten, standings
from surgery.graph.rounding import Rounding
from surgery.graph.stack import CHILD as STACKS
from surgery.graph.stack import Stacks, fold_into

Model = TypeVar("Model", bound=nn.Module)
_LOG = logging.getLogger(__name__)


def merge(
    model: Model,
    *,
    only: str | Sequence[str] = (),
    keep: bool = False,
    requantize: bool = False,
    report: dict[str, Rounding] | None = None,
    tell: Tell = lambda amount: None,
) -> Model:
    """Fold what the program attached into the weights, in place; the same object comes back.

    Sums are taken in float32 (float64 for float64 models) and rounded once to the dtype that the weight had. Weights
    that are kept as codes come back at that width. Places that no matrix can stand for keep their graph.
    A tensor that was tied to another and changes is untied.
    requantize: where weights are kept as codes, the sum is encoded again in the same format, and they stay codes; the
    step between codes may be larger than the change.
    only: name or names of the adapters to fold; the others stay attached, on or off as they are.
    keep: what is needed to take the merge out again, to the bit, with `surgery.unmerge(model)`: the rows of the weights
    that it changes.
    report: gets what rounding did to the change of every tensor, by its name. Where most entries of a change are below
    half a unit in the last place, or the error is larger than the change, and so it is lost, a warning is logged.
    Errors: GraphError S310 for a name that the model does not have, S311 when the model was not transformed, S312 when
    something is switched off, or stays and depends on what would be merged, S313 to requantize where nothing has codes.
    """
    record = record_of(model)
    if record is None:
        raise GraphError.of("S311", "the model was not transformed, there is nothing to merge")
    refuse_routed(model)
    only = (only,) if isinstance(only, str) else only
    check_names(model, only)
    if not only:
        _all_on(model)
    wanted = frozenset(only or names(model))
    sites = [(path, site) for path, site in rewritten(model) if not only or site.branches() & wanted]
    if requantize:
        refuse_without_codes(model)
    for path, site in sites:
        refuse_dependent(path, site, wanted)
    kept = before(model) if keep else None
    base = trained(record.plan, model)
    slots = standings(model)
    folded: dict[str, tuple[Rewritten, nn.Module]] = {}
    roundings: dict[str, Rounding] = {}
    for path, site in sites:
        try:
            told: dict[str, Rounding] = {}
            folded[path] = (
                site,
                fold_some(path, site, wanted, record.plan, slots[id(site)], told, requantize=requantize),
            )
            roundings |= named(path, told)
        except NotAffine:
            if site.branches() <= wanted:
                site.settle()  # the place keeps its graph, and its statements stay in the model's plan
        tell(1)
    for site, plain in folded.values():
        for parent, name in slots[id(site)]:
            parent._modules[name] = plain
    stacked = set()
    for path, module in list(model.named_modules()):
        stacks = module._modules.get(STACKS)
        if isinstance(stacks, Stacks) and stacks.branches() & wanted:
            fold_into(module, wanted)
            stacked.add(path)
    _untie(model)
    once.install(model)
    left = _what_is_left(record, model, wanted, set(folded) | stacked)
    if left.steps:
        declare(left, model)
        model.__dict__[ATTRIBUTE] = remembered(left, model)
        rest(model)
    else:
        for tensor in base.values():
            tensor.requires_grad_(False)
        del model.__dict__[ATTRIBUTE]
        model.__dict__.pop(RESTED, None)
    keep_changes(model, kept)
    if lost := drowned(roundings):
        _LOG.warning("%s", lost)
    if report is not None:
        report.update(roundings)
    return model


def refuse_without_codes(model: nn.Module) -> None:
    """Errors: GraphError S313 where no weight is kept as codes."""
    if not any(has_codes(module) for module in model.modules()):
        raise GraphError.of(
            "S313",
            "no weight of this model is kept as codes, there is nothing to requantize",
            help="merge without it; `quantize` makes codes of plain weights",
        )


def named(path: str, told: Mapping[str, Rounding]) -> dict[str, Rounding]:
    """By the tensors' full names, without those that nothing changes."""
    return {f"{path}.{name}".lstrip("."): one for name, one in told.items() if one.changed}


def drowned(roundings: Mapping[str, Rounding]) -> str:
    """What to say where rounding leaves most entries of some changes as they were; else nothing."""
    found = sorted((one.left_alone, name) for name, one in roundings.items() if one.drowns)
    if not found:
        return ""
    share, name = found[-1]
    if share > 0.5:
        why, most = "rounding leaves most entries as they were, and their change is lost", f"{share:.0%} of {name}"
    else:
        size, name = max((one.relative, name) for name, one in roundings.items())
        why, most = "the error is larger than the change, which is lost", f"{size:.1f} times in {name}"
    return (
        f"in {len(found)} of {len(roundings)} merged tensors {why} ({most}): merge into a wider dtype, or keep the "
        "adapter apart"
    )


def _all_on(model: nn.Module) -> None:
    off = sorted({str(name) for _, site in rewritten(model) for name in site.off})
    if off:
        raise GraphError.of(
            "S312",
            f"`{'`, `'.join(off)}` {'is' if len(off) == 1 else 'are'} switched off, and a merge would lose what is off",
            help="switch all on first: `surgery.activate(model)`; or merge some: `surgery.merge(model, only=[...])`",
        )


def _what_is_left(record: Record, model: nn.Module, wanted: frozenset[str], folded: set[str]) -> Plan:
    """The plan whose result the merged model is: what still has a graph, or a shape of its own."""
    plan = record.plan

    def stays(step: Step, part: Part) -> bool:
        if not _stands(model.get_submodule(part.path), part):
            return False
        if part.path not in folded or part.apart:
            return True
        if step.operation.phase == "quantize":
            return has_codes(model.get_submodule(part.path))
        return step.operation.phase == "attach" and (step.statement.name or "default") not in wanted

    steps = []
    graphs = any(step.operation.rewrites(part) and stays(step, part) for step in plan.steps for part in step.parts)
    shape = plan.reshaping if record.shape == "replay" else ()
    for step in plan.steps if graphs else shape:  # what else was said holds while something of ours is in the model
        parts = tuple(part for part in step.parts if not step.operation.rewrites(part) or stays(step, part))
        if parts or not step.parts:
            settled = _settled(step, model, wanted)
            statement = replace(step.statement, operation=step.operation.folded()) if settled else step.statement
            _reword(model, str(step.statement), str(statement))
            steps.append(Step(statement, parts))
    program = replace(plan.program, statements=tuple(step.statement for step in steps))
    return replace(plan, program=program, steps=tuple(steps), cost=_cost(plan, model, len(steps)), warnings=())


def _settled(step: Step, model: nn.Module, wanted: frozenset[str]) -> bool:
    """Whether every place of a statement has nothing but what was merged."""
    statement = str(step.statement)
    mine = [
        site for _, site in rewritten(model) if any(node.meta.get("statement") == statement for node in site.full.nodes)
    ]
    return all(site.branches() <= wanted for site in mine)


def _reword(model: nn.Module, before: str, after: str) -> None:
    """Let the graphs name a statement as it reads now."""
    nodes = (node for _, site in rewritten(model) for node in (*site.full.nodes, *site.graph.nodes))
    for node in nodes if before != after else ():
        if node.meta.get("statement") == before:
            node.meta["statement"] = after


def _cost(plan: Plan, model: nn.Module, steps: int) -> Cost:
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    size = sum(t.numel() * t.element_size() for t in tensors)
    added = sum(tensor.numel() for tensor in added_parameters(model).values())
    base = sum(tensor.numel() for tensor in trained(plan, model).values())
    return Cost(plan.cost.parameters, size, size, (added, *(0,) * (steps - 1)), (0,) * steps, base_trained=base)


def _stands(module: nn.Module, part: Part) -> bool:
    """Whether a place is still rewritten, itself or in the attention call or the edge that it hands out."""
    if part.kind == "edge":
        return isinstance(module._modules.get(CHILD), Edge)
    return isinstance(module, Rewritten) or any(
        isinstance(child, Rewritten) and child.facts is None and not isinstance(child, Edge)
        for child in module.children()
    )


def _untie(model: nn.Module) -> None:
    """Tell a transformers model that its head no longer shares the embedding's tensor, if so."""
    config = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return
    inside, outside = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    if inside is None or outside is None or inside.weight is outside.weight:
        return
    config.tie_word_embeddings = False  # type: ignore[union-attr]
    seen: set[int] = set()
    ours = {id(tensor) for tensor in added_parameters(model).values()}
    for module in model.modules():  # transformers ties all or nothing: other tensors in two places would get lost
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) in seen - ours:
                module.register_parameter(name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
            seen.add(id(parameter))
