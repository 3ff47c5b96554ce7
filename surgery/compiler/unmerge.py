"""Taking a merge out again, to the bit: what it replaced is kept, of weights only the rows that it changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from surgery.compiler.record import ATTRIBUTE
from surgery.compiler.switch import RESTED, refuse_routed
from surgery.errors import GraphError
from surgery.graph import once
from surgery.graph.digest import digest
from surgery.graph.module import Rewritten, duplicate, rewritten

Model = TypeVar("Model", bound=nn.Module)
KEPT = "_surgery_kept"
STORES = ("_parameters", "_buffers", "_modules")
STATES = (ATTRIBUTE, RESTED)


@dataclass(frozen=True, eq=False)
class Rows:
    """A parameter by another one of its shape, and the rows (along `dim`) in which it differs from it."""

    other: nn.Parameter
    dim: int
    index: Tensor
    rows: Tensor
    trained: bool

    def whole(self) -> nn.Parameter:
        """The parameter itself."""
        return nn.Parameter(self.other.detach().index_copy(self.dim, self.index, self.rows), self.trained)


@dataclass(frozen=True, eq=False)
class Entry:
    """One entry of a module's table that the merge changed: whether it was there, what it was, what it became."""

    module: nn.Module
    store: str
    name: str
    was: Any
    became: Any
    present: bool = True


@dataclass(frozen=True, eq=False)
class Merge:
    """Everything that one merge changed.

    graphs: of places that kept their graph, the graph and the names of its tensors before. trained: tensors that wanted
    gradients. states: what the model knew of itself. tied: what its configuration said. digests: of the merged tensors.
    """

    entries: tuple[Entry, ...]
    classes: tuple[tuple[nn.Module, type[nn.Module]], ...]
    graphs: tuple[tuple[Rewritten, fx.Graph, tuple[str, ...]], ...]
    trained: tuple[Tensor, ...]
    states: dict[str, Any]
    tied: bool | None
    digests: tuple[tuple[Tensor, str], ...]


@dataclass(frozen=True, eq=False)
class Before:
    """The model's tables and states as they are before a merge."""

    tables: tuple[tuple[nn.Module, str, dict[str, Any]], ...]
    classes: tuple[tuple[nn.Module, type[nn.Module]], ...]
    graphs: tuple[tuple[Rewritten, fx.Graph, tuple[str, ...]], ...]
    trained: tuple[Tensor, ...]
    states: dict[str, Any]
    tied: bool | None


def before(model: nn.Module) -> Before:
    """What `keep_changes` compares with."""
    modules = list(_modules(model))
    return Before(
        tuple((module, store, dict(module.__dict__[store])) for module in modules for store in STORES),
        tuple((module, type(module)) for module in modules if not isinstance(module, Rewritten)),
        tuple((site, duplicate(site.full), site.added) for _, site in rewritten(model) if site.facts is None),
        tuple(parameter for parameter in model.parameters() if parameter.requires_grad),
        {name: model.__dict__[name] for name in STATES if name in model.__dict__},
        _tied(model),
    )


def keep_changes(model: nn.Module, kept: Before | None) -> None:
    """Remember what the merge changed, for `unmerge`; None: forget also what was kept of earlier ones."""
    if kept is None:
        model.__dict__.pop(KEPT, None)
        return
    entries = []
    for module, store, table in kept.tables:
        now = module.__dict__[store]
        for name in {**table, **now}:
            if table.get(name) is not now.get(name) or (name in table) != (name in now):
                entries.append(Entry(module, store, name, table.get(name), now.get(name), name in table))
    standing = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    entries = _by_rows(entries, standing)
    merged = {id(tensor) for entry in entries for tensor in _merged(entry.became)} & standing.keys()
    done = Merge(
        tuple(entries),
        tuple((module, was) for module, was in kept.classes if type(module) is not was),
        tuple((site, graph, added) for site, graph, added in kept.graphs if site.added != added),
        kept.trained,
        kept.states,
        kept.tied,
        tuple((standing[key], digest(standing[key])) for key in sorted(merged)),
    )
    model.__dict__[KEPT] = (*model.__dict__.get(KEPT, ()), done)


def _merged(became: Any) -> Iterator[Any]:
    """What the merge has put there: a tensor, or the base's own tensors of a module, whether they have moved or not."""
    yield became
    if isinstance(became, nn.Module):
        ours = became.added if isinstance(became, Rewritten) else ()
        for name, tensor in (*became._parameters.items(), *became._buffers.items()):
            if tensor is not None and name not in ours:
                yield tensor


def _by_rows(entries: list[Entry], standing: Mapping[int, Tensor]) -> list[Entry]:
    """The entries, with weights of which only some rows have changed told by those, and let go."""
    told: dict[int, Rows] = {}
    for entry in entries:
        if isinstance(entry.was, nn.Parameter) and id(entry.was) not in standing and id(entry.became) in standing:
            rows = _rows(entry.was, entry.became)
            if rows is not None:
                told[id(entry.was)] = rows
    found = [replace(entry, was=told.get(id(entry.was), entry.was)) for entry in entries]
    for site in {id(entry.was): entry.was for entry in entries if isinstance(entry.was, Rewritten)}.values():
        for name, parameter in site._parameters.items():
            if id(parameter) in told and parameter is not None:
                blank = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
                found.append(Entry(site, "_parameters", name, told[id(parameter)], blank))
                site._parameters[name] = blank
    return found


def _rows(was: nn.Parameter, became: nn.Parameter) -> Rows | None:
    """The first by the second, None where they differ everywhere, or in what they are."""
    same = (was.shape, was.dtype, was.device) == (became.shape, became.dtype, became.device)
    if not same or was.dim() != 2 or not was.is_floating_point():
        return None
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[was.element_size()]
    differ = was.detach().view(bits) != became.detach().view(bits)
    by_row, by_column = differ.any(1), differ.any(0)
    dim = 0 if by_row.float().mean() <= by_column.float().mean() else 1
    index = (by_column if dim else by_row).nonzero().squeeze(1)
    if 2 * len(index) > was.shape[dim]:
        return None
    return Rows(became, dim, index, was.detach().index_select(dim, index), was.requires_grad)


def unmerge(model: Model) -> Model:
    """Take the last merge that was kept out again, in place: the transformed model, with the base's own bits.

    The same object comes back, with its adapters attached and on or off as they were. Several kept merges are taken out
    one by one, the last one first.
    Errors: GraphError S379 when no merge was kept, or the merged weights have been changed since.
    """
    merges: tuple[Merge, ...] = model.__dict__.get(KEPT, ())
    if not merges:
        raise GraphError.of(
            "S379", "no merge of this model was kept", help="`surgery.merge(model, keep=True)` keeps what it replaces"
        )
    refuse_routed(model)
    last = merges[-1]
    _refuse_changed(model, last)
    whole: dict[int, nn.Parameter] = {}
    for entry in last.entries:
        table, was = entry.module.__dict__[entry.store], entry.was
        if isinstance(was, Rows):
            if id(was) not in whole:
                whole[id(was)] = was.whole()
            was = whole[id(was)]
        if entry.present:
            table[entry.name] = was
        else:
            table.pop(entry.name, None)
        if isinstance(was, nn.Module) and isinstance(entry.became, nn.Module):
            was.train(entry.became.training)
    for module, cls in last.classes:
        module.__class__ = cls
    for site, graph, added in last.graphs:
        object.__setattr__(site, "full", graph)
        object.__setattr__(site, "added", added)
        site.rebuild()
    trained = {id(tensor) for tensor in last.trained} | {id(each) for each in whole.values() if each.requires_grad}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    for name in STATES:
        model.__dict__.pop(name, None)
    model.__dict__.update(last.states)
    if last.tied is not None:
        model.config.tie_word_embeddings = last.tied  # type: ignore[union-attr]
    if merges[:-1]:
        model.__dict__[KEPT] = merges[:-1]
    else:
        del model.__dict__[KEPT]
    once.install(model)
    return model


def _refuse_changed(model: nn.Module, last: Merge) -> None:
    moved = any(
        entry.module.__dict__[entry.store].get(entry.name) is not entry.became
        for entry in last.entries
        if entry.store == "_modules" or isinstance(entry.became, Tensor)
    )
    if moved or any(digest(tensor) != was for tensor, was in last.digests):
        raise GraphError.of(
            "S379",
            "the model has been changed since it was merged, and what the merge replaced does not fit it any more",
            help="unmerge before training, casting or transforming a merged model",
        )


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    """Every module of the model, and those that rewritten places stand for."""
    seen: set[int] = set()
    for module in model.modules():
        for each in (module, *(module.original.modules() if isinstance(module, Rewritten) else ())):
            if id(each) not in seen:
                seen.add(id(each))
                yield each


def _tied(model: nn.Module) -> bool | None:
    tied: bool | None = getattr(getattr(model, "config", None), "tie_word_embeddings", None)
    return tied
