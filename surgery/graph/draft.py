"""Drafts: a projection or lookup on its way to being rewritten, which several statements edit in turn.

Nothing in the model changes until the compiler installs the drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from surgery.graph.capture import Captured, capture
from surgery.graph.module import Facts, Rewritten, duplicate, take_base

LANDMARKS = ("input", "product", "weight", "stored", "output")

Made = TypeVar("Made", bound=Rewritten)


class AnyDraft(Generic[Made]):
    """A place being rewritten: its graph with all branches, and every tensor that it will hold.

    makes: what becomes of it. path: of the module. hollow: new tensors are shapes on the meta device and nothing is
    computed (planning, loading). standing: what an earlier program has put there. original: what was there before any.
    root: holds the tensors and children, of which programs have `added` some.
    """

    makes: ClassVar[type[Rewritten]]
    graph: fx.Graph
    original: nn.Module

    def __init__(self, path: str, hollow: bool, standing: Made | None) -> None:
        self.path, self.hollow, self.standing = path, hollow, standing
        self.root, self.added = nn.Module(), list[str]()
        self.made: Made | None = None

    @property
    def home(self) -> str:
        """Where its tensors will be."""
        return self.path

    def hold(self, module: nn.Module) -> None:
        """Take the tensors and children of a module."""
        for store in ("_parameters", "_buffers", "_modules"):
            self.root.__dict__[store] = dict(module.__dict__[store])
        self.root._non_persistent_buffers_set = set(module._non_persistent_buffers_set)

    def go_on(self, standing: Rewritten) -> None:
        """Begin with what stands there."""
        self.original, self.added = standing.original, list(standing.added)
        self.graph = duplicate(standing.full)
        self.hold(standing)

    def tensor(self, name: str) -> Tensor:
        """A tensor of the place by its name."""
        value: Tensor = getattr(self.root, name)
        return value

    def finish(self) -> Made:
        """The module to install. It may fail, and touches nothing of the model."""
        if self.made is None:
            self.graph.lint()
            made: Any = self.build()
            if self.standing is not None:
                made.follow(self.standing)
            self.made = made
        return self.made

    def build(self) -> Rewritten:
        """What the graph and the tensors make."""
        return self.makes.build(self.root, self.graph, self.original, tuple(self.added))

    def install(self, model: nn.Module) -> Made:
        """Put it into the model."""
        raise NotImplementedError


class Draft(AnyDraft[Rewritten]):
    """A projection or lookup being rewritten.

    slots: every place (parent, child name) where the module stands; shared modules stand in several.
    anew: leave out what is there already, to be written again.
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
        self.slots = slots
        self.actions: list[Callable[[], Any]] = []
        super().__init__(path, hollow, module if isinstance(module, Rewritten) else None)
        if isinstance(module, Rewritten) and anew:
            self._begin_anew(module, path, parameter)
            self.mark()
            return
        if isinstance(module, Rewritten):
            assert module.facts is not None, "an attention call is rewritten by an AttentionDraft"
            self.go_on(module)
            self.facts = module.facts
            nodes = {mark: node for node in self.graph.nodes for mark in node.meta.get("landmarks", ())}
            self.captured = Captured(graph=self.graph, **nodes)
        else:
            self.original = module
            self.hold(module)
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
            self.graph = self.captured.graph
        self.mark()

    def _begin_anew(self, standing: Rewritten, path: str, parameter: str) -> None:
        """The graph that was there first, over the base's tensors as they are now."""
        assert standing.facts is not None, "an attention call is rewritten by an AttentionDraft"
        self.original = standing.original
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
            self.graph = self.captured.graph
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

    def tensor(self, name: str) -> Tensor:
        """A tensor of the place by its name; of one that codes have replaced, the tensor that was there."""
        value: Tensor = self.replaced[name] if name in self.replaced else super().tensor(name)
        return value

    def at_the_end(self, action: Callable[[], Any]) -> None:
        """Something that changes the model's own tensors: done when every draft has succeeded."""
        self.actions.append(action)

    def build(self) -> Rewritten:
        """With the facts of the map, and without what nothing reads any longer."""
        # fx cannot ask a graph that belongs to no module yet whether calling its children (dropout) has side effects.
        self.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        self.mark()
        facts = replace(self.facts, exact=(*self.facts.exact, *self.exact))
        return Rewritten.build(self.root, self.graph, self.original, tuple(self.added), facts)

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
