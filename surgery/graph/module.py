"""A rewritten place: the fx.GraphModule that stands where a module stood, with branches that can be switched off."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from surgery.graph.codes import DEQUANTIZE
from surgery.graph.lower import lower
from surgery.graph.routing import PREFIX, Rows, routed

if TYPE_CHECKING:
    from typing_extensions import Self

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
CODES = "weight_codes"
COMPILED = ("_graph", "_code", "_lineno_map", "_prologue_start")
PASSED_ON = ("in_features", "out_features", "num_embeddings", "embedding_dim", "padding_idx", "nf", "nx")


@dataclass(frozen=True)
class Facts:
    """shape: (out, in), or (vocabulary, width) of a lookup. dtype: of the base's weight at full width.

    plain: the original computes what its class's standard forward does, so that it can hold a folded weight.
    exact: buffers whose bits mean something, which a cast of the model must leave alone.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    lookup: bool
    transposed: bool
    plain: bool
    exact: tuple[str, ...] = ()


class Rewritten(fx.GraphModule):
    """What stands in a model where a site was rewritten.

    full: the graph with every branch; the one that runs is `full` without the branches that are switched off, lowered.
    original: what stood here, to be put back by a merge. It shares its tensors with this module until then.
    added: names of the tensors that the program put beside the base's own.
    off: names of the branches that are switched off; None in it means all.
    facts: of a projection or lookup, what folding needs to know; None of other places.
    routes: branches that rows of a batch choose now, and which do; none outside of `surgery.route`.
    """

    full: fx.Graph
    original: nn.Module
    added: tuple[str, ...]
    off: frozenset[str | None]
    facts: Facts | None
    routes: Mapping[str, Rows] = MappingProxyType({})

    @classmethod
    def build(
        cls,
        root: nn.Module,
        full: fx.Graph,
        original: nn.Module,
        added: tuple[str, ...],
        facts: Facts | None = None,
    ) -> Self:
        """root: a module that holds every tensor and child that the full graph names, and some that it does not."""
        module = cls(root, lower(full), class_name="Rewritten")
        module._keep(root)
        module.train(original.training)
        for name in HOOKS:  # the very same, so that those set on the one are there when a merge puts back the other
            setattr(module, name, getattr(original, name))
        for name in PASSED_ON:
            if hasattr(original, name):
                object.__setattr__(module, name, getattr(original, name))
        module._describe(full, original, added, frozenset(), facts)
        if facts is not None and "weight" not in module._parameters:
            # Some models ask a map for its weight's dtype or shape. Whoever reads its values gets no numbers.
            blank = torch.full((1, 1), torch.nan, dtype=facts.dtype, device=next(module.parameters()).device)
            object.__setattr__(module, "weight", blank.expand(facts.shape))
        return module

    def _describe(self, *values: Any) -> None:
        # Past nn.Module.__setattr__: the original must not become a child, whose tensors would be counted twice.
        for name, value in zip(("full", "original", "added", "off", "facts"), values, strict=True):
            object.__setattr__(self, name, value)

    def _keep(self, root: nn.Module) -> None:
        """Hold on to tensors and children that the running graph does not use (masks, branches that are off)."""
        for name, parameter in root._parameters.items():
            if name not in self._parameters:
                self.register_parameter(name, parameter)
        for name, tensor in root._buffers.items():
            if name not in self._buffers:
                self.register_buffer(name, tensor)
        self._non_persistent_buffers_set |= root._non_persistent_buffers_set
        for name, child in root._modules.items():
            if name not in self._modules:
                self.add_module(name, child)

    def switch(self, off: Container[str | None]) -> None:
        """Run without these branches; None stands for every branch, and an empty container switches all on again."""
        self.route(off, {})

    def route(self, off: Container[str | None], rows: Mapping[str, Rows], shared: bool = False, path: str = "") -> None:
        """Run without the branches that are off, and let rows of a batch choose the others that `rows` names.

        shared: what the place computes may be the same for all rows (a lookup of positions). path: for errors.
        Errors: GraphError S376 where a branch cannot be chosen by row; nothing has changed then.
        """
        branches = self.branches()
        wanted = frozenset(name for name in branches if name in off or None in off)
        choice = {name: chosen for name, chosen in rows.items() if name in branches and name not in wanted}

        def graph() -> fx.Graph:
            running = without(self.full, wanted)
            return lower(routed(running, choice, shared, path) if choice else running)

        self._run((wanted, frozenset(choice)), graph)
        object.__setattr__(self, "off", wanted)
        for name in self.routes:
            self.__dict__.pop(f"{PREFIX}{name}", None)
        for name, chosen in choice.items():
            object.__setattr__(self, f"{PREFIX}{name}", chosen)
        object.__setattr__(self, "routes", choice)
        object.__setattr__(self, "_route", (wanted, choice, shared, path))

    @property
    def state(self) -> tuple[Any, ...]:
        """What runs now, as arguments of `route`."""
        state: tuple[Any, ...] = self.__dict__.get("_route", (self.off, {}))
        return state

    def _run(self, state: object, graph: Callable[[], fx.Graph]) -> None:
        """Run another graph. What was compiled for a state is kept, in a class of its own: what other compilers have
        made of one is keyed by the class, and stays right."""
        now = self.__dict__.get("_state", (frozenset(), frozenset()))
        if state == now:
            return
        states = self.__dict__.get("_states", {})
        fields = states[state][1] if state in states else None
        made = graph() if fields is None else None
        states[now] = (type(self), {name: self.__dict__[name] for name in COMPILED})
        if made is None:
            self.__class__ = states[state][0]
            self.__dict__.update(fields or {})
        else:
            self.__class__ = type(type(self).__name__, type(self).__bases__, {})
            self.graph = made
        self.__dict__["_states"], self.__dict__["_state"] = states, state

    def recompile(self) -> Any:
        """As torch.fx does, but called like any module: fx's own way in costs two more frames at every call."""
        code = super().recompile()
        self.__dict__.pop("_states", None)  # the full graph may be another now
        type(self).__call__ = nn.Module.__call__  # type: ignore[method-assign]
        return code

    def follow(self, standing: Rewritten) -> None:
        """Take over mode and hooks of the module that this one is put in place of."""
        self.train(standing.training)
        for name in HOOKS:
            if getattr(standing, name, None):
                setattr(self, name, getattr(standing, name))

    def rebuild(self) -> None:
        """Run what the full graph says now."""
        self.graph = lower(without(self.full, self.off))

    def settle(self) -> None:
        """Keep as a tensor what the graph computes from tensors alone, where a merge leaves the graph in place."""

    def branches(self) -> set[str]:
        """Names of what can be switched off here."""
        return {node.meta["joint"] for node in self.full.nodes if "joint" in node.meta}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Codes go by the name of the weight that they stand for, as bitsandbytes has it."""
        mine: dict[str, Any] = {}
        super()._save_to_state_dict(mine, prefix, keep_vars)
        codes, weight = f"{prefix}{CODES}", f"{prefix}weight"
        destination.update({weight if name == codes else name: tensor for name, tensor in mine.items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if CODES in self._parameters and f"{prefix}weight" in state_dict:
            state_dict[f"{prefix}{CODES}"] = state_dict.pop(f"{prefix}weight")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        facts = self.facts
        kept = {} if facts is None else {name: self._buffers[name] for name in facts.exact}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in kept.items():
            if tensor is not None:  # moved as bytes, which no cast touches
                moved = fn(tensor.reshape(-1).view(torch.uint8))
                self._buffers[name] = moved.view(tensor.dtype).reshape(tensor.shape)
        if facts is not None:
            blank = fn(torch.empty((1, 1), dtype=facts.dtype, device=next(self.parameters()).device))
            object.__setattr__(self, "facts", replace(facts, dtype=blank.dtype))
            if blank.dtype != facts.dtype:
                self._widen_codes_to(blank.dtype)
            if "weight" in self.__dict__:
                object.__setattr__(self, "weight", blank.fill_(torch.nan).expand(facts.shape))
        return self

    def _widen_codes_to(self, dtype: torch.dtype) -> None:
        """Let codes become weights of the dtype that the rest of the model has now, as they will when it is loaded."""
        nodes = [node for node in self.full.nodes if node.target in DEQUANTIZE]
        for node in nodes:
            node.args = (*node.args[:-1], dtype)
        if nodes:
            self.graph = lower(without(self.full, self.off))

    def __deepcopy__(self, memo: dict[int, Any]) -> Rewritten:
        copied: Rewritten = super().__deepcopy__(memo)  # type: ignore[assignment]
        root = nn.Module()
        for store in ("_parameters", "_buffers", "_modules"):
            root.__dict__[store] = copy.deepcopy(self.__dict__[store], memo)
        root._non_persistent_buffers_set = set(self._non_persistent_buffers_set)
        copied._keep(root)
        copied.training = self.training
        for name in HOOKS:
            setattr(copied, name, copy.deepcopy(getattr(self, name), memo))
        for name in PASSED_ON:
            if name in self.__dict__:
                object.__setattr__(copied, name, self.__dict__[name])
        full, original = copy.deepcopy(self.full, memo), copy.deepcopy(self.original, memo)
        copied._describe(full, original, self.added, self.off, self.facts)
        copied.__dict__["_state"] = (self.off, frozenset())
        if self.routes:  # the choice belongs to the model that is being run
            for name in self.routes:
                copied.__dict__.pop(f"{PREFIX}{name}", None)
            copied.graph = lower(without(full, self.off))
        if "weight" in self.__dict__:
            object.__setattr__(copied, "weight", copy.deepcopy(self.__dict__["weight"], memo))
        return copied


def without(full: fx.Graph, off: Container[str | None]) -> fx.Graph:
    """A copy of a graph in which the joints of some branches are replaced by their base, their first argument."""
    graph = duplicate(full)
    for node in list(graph.nodes):
        if node.meta.get("joint") in off and "joint" in node.meta:
            base = node.args[0]
            base.meta["landmarks"] = (*base.meta.get("landmarks", ()), *node.meta.get("landmarks", ()))
            node.replace_all_uses_with(base)
    for node in reversed(list(graph.nodes)):
        if "statement" in node.meta and not node.users:
            graph.erase_node(node)
    graph.lint()
    return graph


def duplicate(graph: fx.Graph) -> fx.Graph:
    """A copy with the same node names and meta."""
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    return copied


def take_base(root: nn.Module, original: nn.Module, standing: Rewritten) -> None:
    """Give a root the tensors and children of the base as they are now: by the original's names, from what stands."""
    for store in ("_parameters", "_buffers", "_modules"):
        held = standing.__dict__[store]
        root.__dict__[store] = {name: held.get(name, value) for name, value in original.__dict__[store].items()}
    root._non_persistent_buffers_set = set(original._non_persistent_buffers_set)


@contextmanager
def as_before(module: nn.Module) -> Iterator[None]:
    """With what was there before in all rewritten places below a module, for a tracer to see calls and not graphs."""
    below = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent._modules.items()
        if isinstance(child, Rewritten) and child.facts is not None
    ]
    try:
        for parent, name, child in below:
            parent._modules[name] = child.original
        yield
    finally:
        for parent, name, child in below:
            parent._modules[name] = child


def standings(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every place (parent, child name) where a module stands, by its id; shared modules stand in several."""
    places: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for parent in model.modules():
        for name, child in parent._modules.items():
            places[id(child)].append((parent, name))
    return places


def rewritten(model: nn.Module) -> Iterator[tuple[str, Rewritten]]:
    """Every rewritten place with its path."""
    for path, module in model.named_modules():
        if isinstance(module, Rewritten):
            yield path, module


@contextmanager
def switched(model: nn.Module, off: Container[str | None]) -> Iterator[None]:
    """Run with some branches off, then as before."""
    before = [(module, module.state) for _, module in rewritten(model)]
    try:
        for module, _ in before:
            module.switch(off)
        yield
    finally:
        for module, state in before:
            module.switch(state[0])
            module.route(*state)


def numbers(module: nn.Module) -> tuple[torch.dtype, torch.device] | None:
    """Dtype and device of the base's numbers in a module, codes as what they stand for; None where it has none."""
    for each in module.modules():
        ours, facts = (each.added, each.facts) if isinstance(each, Rewritten) else ((), None)
        for name, tensor in each._parameters.items():
            if tensor is None or name in ours:
                continue
            if facts is not None:
                return facts.dtype, tensor.device
            if tensor.is_floating_point():
                return tensor.dtype, tensor.device
    return None


def added_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The trainable tensors that programs put into a model, by full name; each shared one once."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, module in rewritten(model):
        for name, parameter in module.named_parameters():
            if name.partition(".")[0] in module.added and id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{path}.{name}" if path else name] = parameter
    return found
