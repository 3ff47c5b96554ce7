"""Turns findings on the representatives into parts of every layer, in execution order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import fx, nn

from surgery.anatomy.edges import Edges
from surgery.anatomy.lookups import embeddings, norms
from surgery.anatomy.mutation import written
from surgery.anatomy.parts import Anatomy, Part, Stack
from surgery.anatomy.paths import common, moved, within
from surgery.anatomy.products import Product
from surgery.anatomy.roles import Roles
from surgery.anatomy.stacks import Place


class Draft:
    """Parts of the representatives with the moment they run, to be copied to the layers they stand for."""

    def __init__(self, model: nn.Module, roles: Roles) -> None:
        self.model = model
        self.roles = roles
        self.flow = roles.flow
        self.trace = roles.flow.trace
        self.lists = roles.flow.lists
        self.aliases: dict[int, list[str]] = {}
        self.owners: dict[str, int] = {}
        for name, tensor in model.named_parameters(remove_duplicate=False):
            self.aliases.setdefault(id(tensor), []).append(name)
            self.owners[name] = id(tensor)
        self.parts: list[tuple[int, Part]] = []
        self.written = written(self.trace.nodes)

    def described(self, role: str, product: Product, channels: torch.Tensor | None) -> Part:
        return replace(described(role, product, channels), written=product.stored in self.written)

    def add(self, node: fx.Node, part: Part) -> None:
        self.parts.append((self.trace.order[node], part))

    def projections(self) -> None:
        seen = set()
        for finding in self.roles.findings:
            product = finding.product
            seen.add((product.path, product.parameter))
            self.add(product.node, self.described(finding.role, product, finding.channels))
        experts = set()
        self.routed = {self.lists.place(f.product.path) for f in self.roles.findings if f.role == "router"}
        for product in self.flow.products:
            place = (product.path, product.parameter)
            if product.kind == "projection" and place not in seen:
                seen.add(place)
                self.add(product.node, self.described("linear", product, None))
            if product.kind == "experts" and place not in experts:
                experts.add(place)
                routed = self.lists.place(product.path) in self.routed
                self.add(product.node, self.described("experts" if routed else "linear", product, None))
        for role, product in embeddings(self.roles):
            self.add(product.node, self.described(role, product, None))
        for node, path, parameter, width, bias in norms(self.flow):
            self.add(node, Part("norm", "norm", path, parameter, (width,), bias=bias))

    def attention(self) -> None:
        seen = set()
        for found in self.roles.attention:
            key = (found.role, found.call.path)
            if key not in seen:
                seen.add(key)
                self.add(found.call.node, Part(found.role, "attention", found.call.path, "", heads=found.heads))

    def blocks(self) -> None:
        """The innermost module around a layer's ffn, around its attention, and the layer itself."""
        groups: dict[tuple[str, Place], list[tuple[int, str]]] = {}
        layers: dict[Place, int] = {}
        for order, part in self.parts:
            place = self.lists.place(part.path)
            if place is None:
                continue
            layers[place] = min(order, layers.get(place, order))
            family = part.role.partition(".")[0]
            if family in ("ffn", "attn", "cross"):
                groups.setdefault((family, place), []).append((order, part.path))
        for (family, _), members in groups.items():
            path = common(*(path for _, path in members))
            where = self.lists.place(path)
            inside = where is not None and path.rpartition(".")[0] not in self.lists.members
            if inside and path not in {path_ for _, path_ in members if family == "ffn"} - {path}:
                self.parts.append((min(order for order, _ in members), Part(family, "block", path, "")))
        for place, order in layers.items():
            if self.lists.single(place.stack):
                names = {index: name for name, index in self.lists.members[place.stack].items()}
                path = (f"{place.stack}." if place.stack else "") + names[place.layer]
                rescales = not Edges(self.roles).only_adds(path)
                self.parts.append((order, Part("layer", "block", path, "", rescales=rescales)))

    def edges(self) -> None:
        for edge in Edges(self.roles).find():
            if self.lists.place(edge.path) is not None:
                part = Part(edge.role, "edge", edge.path, "", (edge.width,), input=edge.input, inlined=edge.inlined)
                self.add(edge.node, part)

    def everywhere(self) -> list[tuple[int, Part]]:
        """Each part of a representative, and its like in each layer that it stands for."""
        copies = sorted(self.trace.shadow.copies.items(), key=lambda item: -item[0].count("."))
        parts = list(self.parts)
        for representative, others in copies:
            inside = [(order, p) for order, p in parts if within(p.path, representative)]
            for other in others:
                parts += [(order, moved_part(p, representative, other)) for order, p in inside]
        return parts

    def stacks(self, parts: list[tuple[int, Part]]) -> dict[str, Stack]:
        """Names by dataflow: a decoder hides later tokens or reads another stack; an encoder attends both ways."""
        found: dict[str, set[str]] = {}
        start: dict[str, int] = {}
        for order, part in parts:
            place = self.lists.place(part.path)
            if place is not None:
                start[place.stack] = min(order, start.get(place.stack, order))
        for attention in self.roles.attention:
            place = self.lists.place(attention.call.path)
            if place is not None:
                decodes = attention.causal or attention.role == "cross"
                found.setdefault(place.stack, set()).add("decoder" if decodes else "encoder")
        stacks: dict[str, Stack] = {}
        for path in sorted(start, key=lambda p: start[p]):
            kinds = found.get(path, {"stack"})
            base = "decoder" if "decoder" in kinds else min(kinds)
            taken = [stack.name for stack in stacks.values()]
            count = sum(name == base or (name.startswith(base) and name[len(base) :].isdigit()) for name in taken)
            name = f"{base}{count + 1}" if count or base == "stack" else base
            stacks[path] = Stack(name, path, self.lists.depth(path))
        return stacks

    def finish(self) -> Anatomy:
        self.projections()
        self.attention()
        self.blocks()
        self.edges()
        parts = self.everywhere()
        stacks = self.stacks(parts)
        start = {path: place for place, path in enumerate(stacks)}
        first: dict[str, int] = {}
        for order, part in parts:
            where = self.lists.place(part.path)
            if where is not None:
                first[where.stack] = min(order, first.get(where.stack, order))
        ordered: list[tuple[tuple[int, int, int, int, int], Part]] = []
        for order, part in parts:
            where = self.lists.place(part.path)
            block = 0 if part.kind == "block" else 1
            if where is None:
                ordered.append(((order, 0, 0, block, order), self.tie(part)))
            else:
                key = (first[where.stack], start[where.stack] + 1, where.layer, order, block)
                ordered.append((key, replace(self.tie(part), stack=stacks[where.stack].name, layer=where.layer)))
        ordered.sort(key=lambda pair: pair[0])
        return Anatomy(type(self.model).__name__, tuple(stacks.values()), tuple(unique(p for _, p in ordered)))

    def tie(self, part: Part) -> Part:
        if part.kind in ("attention", "block", "edge"):
            return part
        name = f"{part.path}.{part.parameter}" if part.path else part.parameter
        others = [n.rpartition(".")[0] for n in self.aliases.get(self.owners.get(name, 0), []) if n != name]
        return replace(part, tied=tuple(others)) if others else part


def moved_part(part: Part, representative: str, other: str) -> Part:
    """A part of one layer as it is in another layer like it."""
    taken = None if part.input is None else moved(part.input, representative, other)
    return replace(part, path=moved(part.path, representative, other), input=taken)


def described(role: str, product: Product, channels: torch.Tensor | None) -> Part:
    return Part(
        role=role,
        kind=product.kind,
        path=product.path,
        parameter=product.parameter,
        shape=product.shape if product.rows is None else (product.shape[0], product.shape[1]),
        transposed=product.transposed,
        bias=product.bias,
        channels=runs(channels, product),
    )


def runs(mask: torch.Tensor | None, product: Product) -> tuple[tuple[int, int], ...] | None:
    """Runs of channels as (start, stop); None for all of them."""
    offset = product.rows[0] if product.rows else 0
    if mask is None:
        return (product.rows,) if product.rows else None
    if bool(mask.all()) and product.rows is None:
        return None
    padded = torch.nn.functional.pad(mask.int(), (1, 1))
    edges = (padded[1:] - padded[:-1]).nonzero().flatten().tolist()
    return tuple((edges[i] + offset, edges[i + 1] + offset) for i in range(0, len(edges), 2))


def unique(parts: Iterable[Part]) -> list[Part]:
    return list(dict.fromkeys(parts))


def build(model: nn.Module, roles: Roles) -> Anatomy:
    """The anatomy of the whole model from the roles of its representatives."""
    return Draft(model, roles).finish()
