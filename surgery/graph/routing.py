"""Per-row choice in one batch: the graph in which every row takes its own branches, cut in at the branches' joints."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from surgery.errors import GraphError
from surgery.graph.functions import add_branch, linear_as, low_rank

PREFIX = "route_"


@dataclass(frozen=True, eq=False)
class Rows:
    """Which rows of a batch take a branch.

    mask: (rows,) bool. index: (chosen,) their numbers. runs: (start, stop) of those that are neighbours.
    Compiled code reads the mask alone, so that another choice is no other code.
    """

    mask: Tensor
    index: Tensor
    runs: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, chosen: list[bool], device: torch.device) -> Rows:
        index = [place for place, taken in enumerate(chosen) if taken]
        starts = [place for place in index if place - 1 not in index]
        stops = [place + 1 for place in index if place + 1 not in index]
        runs = tuple(zip(starts, stops, strict=True))
        return cls(torch.tensor(chosen, device=device), torch.tensor(index, device=device), runs)


def per_row(rows: Rows, value: Tensor) -> int:
    """How many neighbouring entries of a value's first dimension belong to one row: beams, heads, or its tokens."""
    count, length = rows.mask.shape[0], value.shape[0]
    if length % count:
        raise GraphError.of(
            "S375",
            f"the route is for {count} rows, and a place reads {length}, which are not as many for each",
            help="give a name or None for every row of the batch; places that read tokens in an order of their own "
            "cannot be routed",
        )
    return length // count


def along(rows: Rows, value: Tensor, shared: bool = False) -> Tensor:
    """The mask, to be broadcast over a value. shared: a value that all rows may have in common (positions)."""
    if shared and (value.dim() == 2 or value.shape[0] == 1):
        mask, dimensions = rows.mask, 3
    else:
        repeated = per_row(rows, value)
        mask = rows.mask if repeated == 1 else rows.mask.repeat_interleave(repeated)
        dimensions = value.dim()
    return mask.to(value.device).view(-1, *(1,) * (dimensions - 1))


def choose(joint: Tensor, base: Tensor, rows: Rows, shared: bool = False) -> Tensor:
    """The joint's value in the rows that take the branch, the base's bits in the others."""
    return torch.where(along(rows, joint, shared), joint, base)


def low_rank_rows(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, rows: Rows, owned: bool) -> Tensor:
    """y + scale * b a x in the rows that take the branch, for whose products alone is paid. owned: y may be written to.

    x: (rows, ..., in) as y's rows; a: (rank, in); b: (out, rank).
    """
    if torch.compiler.is_compiling():
        branch = low_rank(x, a, b, scale)
        return add_branch(y, torch.where(along(rows, branch), branch, 0.0))  # type: ignore[no-any-return]
    repeated = per_row(rows, x)
    plain = y.dtype == a.dtype == x.dtype
    if torch.is_grad_enabled() or len(rows.runs) > FEW:
        index = rows.index.to(x.device)
        if repeated != 1:
            index = (index[:, None] * repeated + torch.arange(repeated, device=index.device)).flatten()
        branch = low_rank(x.index_select(0, index), a, b, scale)
        if plain:
            return torch.index_add(y, 0, index, branch)
        return y.index_copy(0, index, add_branch(y.index_select(0, index), branch))
    y = y if owned else y.clone()
    for start, stop in rows.runs:
        into, some = (each[start * repeated : stop * repeated] for each in (y, x))
        if plain and y.is_contiguous():
            inner = F.linear(some.reshape(-1, x.shape[-1]), a)
            into.view(-1, y.shape[-1]).addmm_(inner, b.t(), alpha=scale)
        else:
            into.copy_(add_branch(into, low_rank(some, a, b, scale)))
    return y


FEW = 8
"""Up to so many runs are added in place one by one; rows more scattered are gathered."""
FRESH = (F.linear, linear_as, low_rank_rows)


def routed(graph: fx.Graph, names: Container[str], shared: bool, path: str) -> fx.Graph:
    """The graph, changed so that rows choose the branches of these names; `self.route_NAME` says which rows take one.

    Errors: GraphError S376 where a branch is joined to something that is not the rows' own.
    """
    moving = _depends_on_input(graph)
    for node in list(graph.nodes):
        name = node.meta.get("joint")
        if name is None or name not in names:
            continue
        if node not in moving or node.args[0] not in moving:
            raise GraphError.of(
                "S376",
                f"`{name}` changes a weight at {path}, which all rows of a batch share",
                help="activate it for the whole batch",
            )
        with graph.inserting_before(node):
            rows = graph.create_node("get_attr", f"{PREFIX}{name}", (), {})
        base, branch = node.args[0], (*node.args, None)[1]
        with graph.inserting_after(node):
            if node.target is add_branch and _is_low_rank(branch) and not shared:
                owned = base.target in FRESH and set(base.users) <= {node}
                new = graph.call_function(low_rank_rows, (base, *branch.args, rows, owned))
                node.replace_all_uses_with(new)
                graph.erase_node(node)
                graph.erase_node(branch)
            else:
                new = graph.call_function(choose, (node, base, rows, shared))
                node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
        new.meta["statement"] = node.meta.get("statement")
        moving.add(new)
    return graph


def _is_low_rank(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is low_rank and len(node.users) == 1


def _depends_on_input(graph: fx.Graph) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found
