"""Drafts: a projection or lookup on its way to being rewritten, which several statements edit in turn.

Nothing in the model changes until the compiler installs the drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from surgery.graph.capture import Captured, capture
from surgery.graph.module import Facts, Rewritten, duplicate, take_base

LANDMARKS = ("input", "product", "weight", "stored", "output")


class Draft:
    """A module being rewritten: its graph with all branches, and every tensor it will hold.

    hollow: new tensors are shapes on the meta device and nothing is computed (planning, loading).
    slots: every place (parent, child name) where the module stands; shared modules stand in several.
    anew: leave out what is there already, to be written again. standing: what is there.
    wide: the (out, in) weight that codes were made from, while it is at hand. encode: makes codes of another one.
    held: what codes are made of now, where that is not `wide` and parts of it belong to several statements.
    """

    def __init__(
        self,
        module: nn.Module,
        path: str,
        parameter: str = "weight",
        hollow: bool = False,
        slots: Sequence[tuple[nn.Module, str]] = (),
        anew: bool = False,
    ) -> None:
        self.exact: list[str] = []
        self.wide: fx.Node | None = None
        self.encode: Callable[[Tensor], None] | None = None
        self.held: Tensor | None = None
        self.replaced: dict[str, nn.Parameter] = {}
        self.made: Rewritten | None = None
        self.path, self.hollow, self.slots = path, hollow, slots
        self.actions: list[Callable[[], Any]] = []
        self.root = nn.Module()
        self.standing = module if isinstance(module, Rewritten) else None
        if isinstance(module, Rewritten) and anew:
            self._begin_anew(module, path, parameter)
            self.mark()
            return
        if isinstance(module, Rewritten):
            assert module.facts is not None, "an attention call is rewritten by an AttentionDraft"
            self.original, self.added, self.facts = module.original, list(module.added), module.facts
            graph = duplicate(module.full)
            nodes = {mark: node for node in graph.nodes for mark in node.meta.get("landmarks", ())}
            self.captured = Captured(graph=graph, **nodes)
        else:
            self.original, self.added = module, []
            self.captured = capture(module, path, parameter, slots[0][0] if slots else None)
            weight = module._parameters[parameter]
            assert weight is not None
            self.facts = Facts(
                shape=(weight.shape[1], weight.shape[0]) if self.transposed else (weight.shape[0], weight.shape[1]),
                dtype=weight.dtype,
                lookup=self.captured.product.target is F.embedding,
                transposed=self.transposed,
                plain=self.captured.plain,
            )
        for store in ("_parameters", "_buffers", "_modules"):
            self.root.__dict__[store] = dict(module.__dict__[store])
        self.root._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
        self.mark()

    def _begin_anew(self, standing: Rewritten, path: str, parameter: str) -> None:
        """The graph that was there first, over the base's tensors as they are now."""
        assert standing.facts is not None, "an attention call is rewritten by an AttentionDraft"
        self.original, self.added = standing.original, []
        self.facts = replace(standing.facts, exact=())
        take_base(self.root, self.original, standing)
        if self.root._parameters.get(parameter) is None:  # codes stand for it: only its shape is known
            rows, columns = self.facts.shape
            shape = (columns, rows) if self.facts.transposed else (rows, columns)
            blank = torch.empty(shape, dtype=self.facts.dtype, device="meta")
            self.root._parameters[parameter] = nn.Parameter(blank, requires_grad=False)
        held = dict(self.original._parameters)
        try:
            self.original._parameters.update(self.root._parameters)
            self.captured = capture(self.original, path, parameter, self.slots[0][0] if self.slots else None)
        finally:
            self.original._parameters.clear()
            self.original._parameters.update(held)

    def mark(self) -> None:
        """Write the landmarks into the nodes' meta, where a later program finds them."""
        for node in self.captured.graph.nodes:
            node.meta.pop("landmarks", None)
        for name in LANDMARKS:
            node = getattr(self.captured, name)
            node.meta["landmarks"] = (*node.meta.get("landmarks", ()), name)  # one node may be several

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored (in, out)."""
        return self.captured.transposed

    @property
    def device(self) -> torch.device:
        """Where the original's tensors are."""
        return next((self.standing or self.original).parameters(), torch.empty(0)).device

    @property
    def graph(self) -> fx.Graph:
        return self.captured.graph

    @property
    def home(self) -> str:
        """Where its tensors will be."""
        return self.path

    def tensor(self, name: str) -> Tensor:
        """A tensor of the site by its name; of one that codes have replaced, the tensor that was there."""
        value: Tensor = self.replaced[name] if name in self.replaced else getattr(self.root, name)
        return value

    def at_the_end(self, action: Callable[[], Any]) -> None:
        """Something that changes the model's own tensors: done when every draft has succeeded."""
        self.actions.append(action)

    def finish(self) -> Rewritten:
        """The module to install; nothing of the model is touched."""
        if self.made is not None:
            return self.made
        # fx cannot ask a graph that belongs to no module yet whether calling its children (dropout) has side effects.
        self.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        self.mark()
        self.graph.lint()
        facts = replace(self.facts, exact=(*self.facts.exact, *self.exact))
        self.made = Rewritten.build(self.root, self.graph, self.original, tuple(self.added), facts)
        if self.standing is not None:
            self.made.follow(self.standing)
        return self.made

    def settle(self) -> None:
        """Do what was put off to the end."""
        for action in self.actions:
            action()

    def install(self, model: nn.Module) -> Rewritten:
        """Put the finished module wherever the original stands."""
        module = self.finish()
        self.replaced.clear()
        self.settle()
        for parent, name in self.slots:
            parent._modules[name] = module
        for name, parameter in self.original._parameters.items():
            if parameter is not None and self.root._parameters.get(name) is not parameter:
                self.original._parameters[name] = None  # replaced: what stood there must not keep its memory
        return module

    def evaluate(self, node: fx.Node) -> Tensor:
        """The value of a node that does not depend on the input."""
        if node.op == "get_attr":
            value = self.tensor(str(node.target)).detach()
            return value.requires_grad_(value.is_floating_point())
        # As tensors that want gradients: a mask is multiplied in for those, and the weight itself is zeroed at the end.
        args = fx.map_arg(node.args, self.evaluate)
        kwargs = fx.map_arg(node.kwargs, self.evaluate)
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator,no-any-return]
