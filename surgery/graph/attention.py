"""Attention sites: query, key, value, mask -> out as a small graph, and the edits that methods make on it.

Three ways lead there. A transformers model hands the call over through its AttentionInterface, or else its keys and
values through its cache; a module in plain torch is traced. A method sees none of this: it puts keys and values in
front, or adds a second attention to the output (where the call itself is in reach, not through a cache).
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import fx, nn

from surgery.anatomy.parts import Heads, Part
from surgery.errors import GraphError
from surgery.graph import attention_cache, attention_hand, attention_interface, attention_trace
from surgery.graph.attention_math import (
    absent,
    alone_keywords,
    gated,
    like,
    prefixed_mask,
    prepend,
    prepend_scores,
)
from surgery.graph.attention_places import prefixed_call_mask, prefixed_keywords, table_of_distances
from surgery.graph.draft import AnyDraft
from surgery.graph.entry import Shifting
from surgery.graph.module import Rewritten, as_before, numbers, take_base
from surgery.graph.site import Init, Site, seed_of, zeros

Pool = MutableMapping[str, nn.Parameter]


class AttentionDraft(AnyDraft[Rewritten]):
    """An attention module being rewritten: the graph of its call.

    by_interface: the call is a child of the module; by_cache: what the module's cache gives goes through a child;
        otherwise the whole module is what is rewritten.
    pool: parameters that several sites of one statement share. anew: leave out what is there already.
    """

    makes = Shifting

    def __init__(
        self,
        module: nn.Module,
        part: Part,
        hollow: bool = False,
        pool: Pool | None = None,
        anew: bool = False,
    ) -> None:
        self.part, self.module = part, module
        self.pool: Pool = {} if pool is None else pool
        apart = not isinstance(module, Rewritten)
        self.by_interface = apart and attention_interface.through_interface(module)
        self.by_cache = apart and not self.by_interface and attention_cache.through_cache(module)
        self.dtype, self.device = numbers(module) or (torch.get_default_dtype(), torch.device("cpu"))
        held = getattr(module, attention_interface.CHILD, None) if self.has_child else module
        super().__init__(part.path, hollow, held if isinstance(held, Rewritten) else None)
        if self.standing is not None and not anew:
            self.go_on(self.standing)
        elif self.by_interface:
            self.original = nn.Module().train(module.training)
            self.root.add_module("core", attention_interface.core(module, part.path))
            self.graph, marks = attention_interface.graph()
            self._mark(marks)
        elif self.by_cache:
            self.original = nn.Module().train(module.training)
            self.graph, marks = attention_cache.graph()
            self._mark(marks)
        else:
            module = module if self.standing is None else self.standing.original
            self.original = module
            self.hold(module)
            self.graph = self._traced(module)
            for name, mode in self.graph.modes.items():  # type: ignore[attr-defined]
                self.root.add_module(name, mode)
            for name, constant in self.graph.constants.items():  # type: ignore[attr-defined]
                self.root.register_buffer(name, constant.detach(), persistent=False)
            self._mark(attention_trace.landmarks(self.graph, module, part.path))
            if self.standing is not None:
                take_base(self.root, self.original, self.standing)

    @property
    def has_child(self) -> bool:
        """Whether the module stays, and what is rewritten is a child of it."""
        return self.by_interface or self.by_cache

    @property
    def home(self) -> str:
        """Where its tensors will be."""
        return f"{self.path}.{attention_interface.CHILD}".lstrip(".") if self.has_child else self.path

    def _traced(self, module: nn.Module) -> fx.Graph:
        refusal = attention_interface.out_of_reach(module, self.path)
        if refusal is not None:
            raise refusal
        try:
            with as_before(module):
                return attention_trace.trace(module, self.path, frozenset(self.part.given))
        except GraphError as error:
            reason = error.diagnostics[0].message.rpartition(": ")[2]
            raise attention_interface.out_of_reach(module, self.path, reason) or error from None

    def _mark(self, marks: dict[str, fx.Node]) -> None:
        for name, node in marks.items():
            node.meta.setdefault("landmarks", set()).add(name)

    def node(self, landmark: str) -> fx.Node | None:
        """The node with this meaning, such as `query`."""
        return next((node for node in self.graph.nodes if landmark in node.meta.get("landmarks", ())), None)

    def install(self, model: nn.Module) -> Rewritten:
        """Put the rewritten call into the model."""
        made = self.finish()
        if self.has_child:
            module = model.get_submodule(self.path)
            (attention_interface if self.by_interface else attention_cache).attach(module, made)
            if self.by_interface and self.part.role != "cross":
                made.core.distances = table_of_distances(model, self.path)  # type: ignore[union-attr]
            return made
        # One dictionary of children for both, so that a child that is replaced after this is replaced here.
        # One that was replaced before is kept: the draft holds those of the time when it was begun.
        for name, child in made._modules.items():
            self.original._modules.setdefault(name, child)
        made.__dict__["_modules"] = self.original._modules
        parent, _, last = self.path.rpartition(".")
        model.get_submodule(parent)._modules[last] = made
        return made


class AttentionSite(Site):
    """One attention call as one statement sees it. `heads` are those of the call."""

    draft: AttentionDraft  # type: ignore[assignment]

    def __init__(
        self, draft: AttentionDraft, part: Part, statement: str, name: str | None, verb: str, seed: int = 0
    ) -> None:
        super().__init__(draft, part, statement, name, verb, seed)
        if part.heads is None:
            raise GraphError.of("S345", f"the number of heads of the attention at {part.path} is not known")
        self.heads: Heads = part.heads

    @property
    def installed_path(self) -> str:
        """Where the tensors of this site will be."""
        return self.draft.home

    @property
    def query(self) -> fx.Node:
        """(batch, heads, queries, width)."""
        return self._landmark("query")

    @property
    def out(self) -> fx.Node:
        """What the attention gives so far: (batch, queries, heads, width) by interface, else as the module has it."""
        return self._landmark("out")

    @property
    def width(self) -> int:
        """Of all query heads side by side."""
        return self.heads.query * self.heads.key_width

    @property
    def dtype(self) -> torch.dtype:
        return self.draft.dtype

    @property
    def device(self) -> torch.device:
        return torch.device("meta") if self.draft.hollow else self.draft.device

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A new node, in front of the attention call."""
        with self.draft.graph.inserting_before(self._landmark("core")):
            node = self.draft.graph.call_function(function, args, kwargs)
        return self._ours(node)

    def shared(self, name: str, shape: tuple[int, ...], init: Init = zeros) -> fx.Node:
        """A trainable tensor that all sites of the statement have together."""
        full, key = self.full_name(name), f"{self.statement}\0{name}"
        if full in self.kept:
            return self._attribute(name, self.kept[full])
        if key not in self.draft.pool:
            tensor = torch.empty(shape, dtype=self._wide, device=self.device)
            if not tensor.is_meta:
                drawn = torch.empty(shape, dtype=torch.float64 if self._wide == torch.float64 else torch.float32)
                with torch.no_grad():
                    init(drawn, torch.Generator().manual_seed(seed_of(self.seed, self.verb, full)))
                    tensor.copy_(drawn)
            self.draft.pool[key] = nn.Parameter(tensor)
        return self._attribute(name, self.draft.pool[key])

    def folds_to(self, name: str, node: fx.Node) -> fx.Node:
        """The node, whose value a merge keeps as a tensor of this name instead of what it is computed from."""
        node.meta["folds_to"] = self.full_name(name)
        return node

    @property
    def _wide(self) -> torch.dtype:
        return torch.float32 if self.dtype.itemsize < 4 else self.dtype

    # Edits

    def put_in_front(
        self, key: fx.Node, value: fx.Node, positions: int, windowed: bool = False, count: fx.Node | None = None
    ) -> None:
        """K = [key; K], V = [value; V], seen by every query. key: (key-value heads, positions, width).

        windowed: where the model's attention has a window, the prefix is seen as tokens in its place would be.
        count: how many positions there are now, where that may be fewer.
        """
        if self.draft.by_cache:
            joined = self._in_front_of_cache(key, value)
        elif self.draft.node("scores") is not None:
            joined = self._in_front_of_scores(key, value)
        else:
            joined = self._in_front_of_call(key, value, positions if count is None else count, windowed)
        joined.meta["front"] = positions
        if self.part.role != "cross":  # the queries of a cross-attention stand in another sequence
            joined.meta["positions"] = positions

    def _in_front_of_cache(self, key: fx.Node, value: fx.Node) -> fx.Node:
        core, heads = self._landmark("core"), self.heads.query
        self._join(self.call(prepend, core.args[0], key, heads), core, 0)
        joined = self.call(prepend, core.args[1], value, heads)
        self._join(joined, core, 1)
        return joined

    def _in_front_of_scores(self, key: fx.Node, value: fx.Node) -> fx.Node:
        heads, core = self.heads.query, self._landmark("core")
        scores = self._landmark("scores")
        added = attention_hand.scaled_scores(scores, key, heads, self.path, self.call)
        self._join(self.call(prepend_scores, core.args[0], added), core, 0)
        out = self._landmark("product_out")
        with self.draft.graph.inserting_before(out):
            joined = self._ours(self.draft.graph.call_function(prepend, (out.args[1], value, heads)))
        self._join(joined, out, 1)
        return joined

    def _in_front_of_call(self, key: fx.Node, value: fx.Node, positions: int | fx.Node, windowed: bool) -> fx.Node:
        heads, core = self.heads.query, self._landmark("core")
        places = {"query": 0, "key": 1, "value": 2, "mask": 3, "keywords": 4}
        first = 1 if self.draft.by_interface else 0  # the module itself
        operands = {name: core.args[place + first] for name, place in places.items() if place + first < len(core.args)}
        if self.draft.by_interface:
            call = (operands["mask"], core.args[0], operands["query"], operands["key"], operands["keywords"], positions)
            mask = self.call(prefixed_call_mask, *call, self._causal_without_mask, windowed)
            self._join(self.call(prefixed_keywords, operands["keywords"], *call[:4], positions), core, 5)
        else:
            mask = self.call(
                prefixed_mask, operands["mask"], operands["query"], operands["key"], core.args[4], positions
            )
        self._join(mask, core, 3 + first)
        self._join(self.call(prepend, operands["key"], key, heads), core, 1 + first)
        joined = self.call(prepend, operands["value"], value, heads)
        self._join(joined, core, 2 + first)
        return joined

    def attend_beside(self, key: fx.Node, value: fx.Node, gate: fx.Node) -> None:
        """out + tanh(gate) * softmax(query key^T) value; gate: (heads,). At gate = 0 the output keeps its bits."""
        if self.draft.by_cache:
            raise GraphError.of(
                "S385",
                f"a gate needs the attention call itself, and `{type(self.draft.module).__name__}` at {self.path} "
                "gives out its keys and values only",
                help="leave `gated` out, or leave the place out with `except`",
            )
        core, heads, graph = self._landmark("core"), self.heads.query, self.draft.graph
        if self.draft.node("scores") is not None:
            scores = attention_hand.scaled_scores(self._landmark("scores"), key, heads, self.path, self.call)
            out: Any = self._landmark("product_out")
            own = self.call(like, value, self._landmark("value"), heads)
            share = attention_hand.weighted(core, out, scores, own, self.out)
        else:
            first = 1 if self.draft.by_interface else 0
            own_key = self.call(like, key, self._landmark("key"), heads)
            own_value = self.call(like, value, self._landmark("value"), heads)
            args = list(core.args)
            args[1 + first], args[2 + first], args[3 + first] = own_key, own_value, self.call(absent)
            if self.draft.by_interface:
                args[5] = self.call(alone_keywords, self._landmark("keywords"), self._causal_without_mask)
            else:
                args[4] = False
            with graph.inserting_before(core):
                share = self._ours(graph.create_node(core.op, core.target, tuple(args), dict(core.kwargs)))
                if self.draft.by_interface:
                    share = self._ours(graph.call_function(attention_interface.item, (share, 0)))
        before = self.out
        with graph.inserting_after(max(before, share)):
            joint = self._ours(graph.call_function(gated, (before, share, gate, 2 if self.draft.by_interface else 1)))
        joint.meta["joint"] = self.name
        before.replace_all_uses_with(joint, delete_user_cb=lambda user: user is not joint)
        before.meta["landmarks"].discard("out")
        joint.meta["landmarks"] = {"out"}

    @property
    def _causal_without_mask(self) -> bool:
        core: Any = self.draft.root.core
        return bool(core.causal_without_mask)

    def _landmark(self, name: str) -> fx.Node:
        node = self.draft.node(name)
        if node is None:
            raise GraphError.of("S350", f"the attention at {self.path} has no {name} that can be named")
        return node

    def _join(self, joint: fx.Node, user: fx.Node, place: int) -> None:
        """Let one node read the joint where it read the joint's first argument."""
        joint.meta["joint"] = self.name
        user.update_arg(place, joint)
