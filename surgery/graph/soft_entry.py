"""The entry of a stack as a site: a graph that gives the prompts, held by a child of the module that runs the stack."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.anatomy.entries import FRONT, INSIDE
from surgery.anatomy.parts import Anatomy, Part
from surgery.errors import GraphError
from surgery.graph import soft, soft_loss
from surgery.graph.attention import AttentionSite
from surgery.graph.draft import AnyDraft
from surgery.graph.insertion import Insertion
from surgery.graph.insertion import remove as remove_insertions
from surgery.graph.insertion_entrance import Entrance
from surgery.graph.settle import Settling
from surgery.graph.site import Site


class SoftEntry(Settling):
    """Gives the prompts that are on: a tuple of (rank, name, rows (n, width) or token numbers (n,)).

    computes: dtype of the model's embeddings. lookup: path of the word embeddings from the root of the model.
    """

    role: str
    stack: str
    lookup: str
    shape: tuple[int, ...]

    @property
    def computes(self) -> torch.dtype:
        """What a cast of the model casts with it."""
        return self.get_buffer("like").dtype

    def __deepcopy__(self, memo: dict[int, Any]) -> SoftEntry:
        copied: SoftEntry = super().__deepcopy__(memo)  # type: ignore[assignment]
        copied.about(self.role, self.stack, self.lookup, self.shape)
        return copied

    def about(self, role: str, stack: str, lookup: str, shape: tuple[int, ...]) -> None:
        """Remember what of the model is at this entry."""
        for name, value in (("role", role), ("stack", stack), ("lookup", lookup), ("shape", shape)):
            object.__setattr__(self, name, value)


class EntryDraft(AnyDraft[SoftEntry]):
    """An entry being rewritten. anew: leave out what stands there already."""

    makes = SoftEntry

    def __init__(self, model: nn.Module, part: Part, hollow: bool = False, anew: bool = False) -> None:
        self.part, self.module = part, model.get_submodule(part.path)
        held = self.module._modules.get(soft.CHILD)
        super().__init__(part.path, hollow, held if isinstance(held, SoftEntry) else None)
        assert part.input is not None
        lookup = model.get_submodule(part.input)
        table = next(lookup.parameters())
        facts = getattr(lookup, "facts", None)
        self.dtype: torch.dtype = table.dtype if facts is None else facts.dtype
        self.device = table.device
        if self.standing is not None and not anew:
            self.go_on(self.standing)
        else:
            self.original, self.graph = nn.Module().train(self.module.training), fx.Graph()
            self.graph.output(self.graph.call_function(soft.nothing))
        self.root.register_buffer("like", torch.empty(0, dtype=self.dtype, device=self.device), persistent=False)

    @property
    def home(self) -> str:
        """Where its tensors will be."""
        return f"{self.path}.{soft.CHILD}".lstrip(".")

    def build(self) -> SoftEntry:
        """With what it is the entry of."""
        made: SoftEntry = super().build()  # type: ignore[assignment]
        made.about(self.part.role, self.part.stack or "", str(self.part.input), self.part.shape)
        return made

    def install(self, model: nn.Module) -> SoftEntry:
        """Put it into the model. The hooks come last of all, with `install` of this file."""
        made = self.finish()
        self.module.add_module(soft.CHILD, made)
        return made


class EntrySite(Site):
    """An entry as one statement sees it. `width` is that of the rows."""

    draft: EntryDraft  # type: ignore[assignment]

    @property
    def width(self) -> int:
        return self.part.shape[1]

    @property
    def vocabulary(self) -> int:
        return self.part.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.draft.dtype

    @property
    def in_front(self) -> bool:
        """Whether the stack is causal, so that the rows are read before the tokens."""
        return self.part.role == FRONT

    def folds_to(self, name: str, node: fx.Node) -> fx.Node:
        """The node, whose value a merge keeps as a tensor of this name instead of what it is computed from."""
        node.meta["folds_to"] = self.full_name(name)
        return node

    def give(self, rows: fx.Node, rank: int) -> None:
        """Let the entry give these rows (n, width), or token numbers (n,), too; lower ranks come first."""
        (end,) = (node for node in self.draft.graph.nodes if node.op == "output")
        joint = self.call(soft.appended, end.args[0], key(self), rank, rows)
        joint.meta["joint"] = self.name
        end.args = (joint,)

    def embeddings(self, ids: list[int], context: Any) -> Tensor:
        """Embeddings (n, width) of token numbers, as the transformed model looks them up."""
        assert self.part.input is not None
        lookup = context.model.get_submodule(self.part.input)
        with torch.no_grad():
            found = lookup(torch.tensor([ids], device=self.draft.device))
        if not isinstance(found, Tensor):
            raise GraphError.of(
                "S394",
                f"{self.part.input} gives a {type(found).__name__}, and no tensor that more rows could stand in",
                help="take `prefix` instead",
            )
        return found[0]


def key(site: Site) -> str:
    """What a prompt is called at its entry and at the attention calls."""
    return site.full_name(site.verb)


def put_states(site: AttentionSite, positions: int, stored: bool) -> None:
    """At an attention call: put the keys and values of the statement's prompt in front, as the stack has read them.

    stored: read once, when the statement is carried out, and kept as tensors of the model.
    """
    heads, kept = site.heads, []
    if stored:
        for name, width in (("key", heads.key_width), ("value", heads.value_width)):
            tensor = torch.zeros(heads.key_value, positions, width, dtype=site.dtype, device=site.device)
            kept.append(site.buffer(f"{site.verb}_{name}", tensor))
    full = site.full_name(f"{site.verb}_states")
    site.draft.root.add_module(full, soft.States(key(site), heads.key_value, stored))
    site.draft.added.append(full)
    own = (_own(site, "key"), _own(site, "value"))
    with site.draft.graph.inserting_before(site.draft.node("core")):
        pair = site._ours(site.draft.graph.call_module(full, (*own, *kept)))
    first, second = site.call(item, pair, 0), site.call(item, pair, 1)
    site.put_in_front(first, second, positions, windowed=True, count=site.call(soft.length, first))


def _own(site: AttentionSite, name: str) -> fx.Node:
    """Keys or values as the call reads them when nothing is in front: (batch, heads, length, width)."""
    node = site.draft.node(name)
    if node is None and (turned := site.draft.node(f"transposed_{name}")) is not None:
        return site.call(torch.transpose, turned, -2, -1)
    if node is None:
        raise GraphError.of("S350", f"the attention at {site.path} has no {name} that can be named")
    return node


def item(pair: tuple[Any, Any], index: int) -> Any:
    """One of two."""
    return pair[index]


def install(model: nn.Module, anatomy: Anatomy) -> None:
    """Set the hooks of every entry. Repeat it after every change of the model's modules."""
    soft.remove(model)
    soft_loss.remove(model)
    remove_insertions(model)
    found = [(path, m._modules[soft.CHILD]) for path, m in model.named_modules() if soft.CHILD in m._modules]
    for path, held in found:
        assert isinstance(held, SoftEntry)
        lookup = Part("embed", "lookup", held.lookup, "weight", held.shape)
        if held.role == INSIDE:
            stack = next(stack for stack in anatomy.stacks if stack.name == held.stack)
            entrance = Entrance.find(model, Anatomy(anatomy.model, anatomy.stacks, (*anatomy.parts, lookup)), stack)
            Insertion(entrance, Rows(held, model.get_submodule(held.lookup))).install(model)
        else:
            (stack,) = (stack for stack in anatomy.stacks if stack.name == held.stack)
            front = soft.install_front(model, anatomy, path, lookup)
            soft_loss.install(model, path, stack.path, front)


class Rows:
    """What an insertion asks for its rows: all prompts of an entry one behind the other, or None."""

    def __init__(self, entry: SoftEntry, lookup: nn.Module) -> None:
        self.entry, self.lookup = entry, lookup

    def __call__(self) -> Tensor | None:
        prompts = [rows for _, _, rows in sorted(self.entry(), key=soft.order)]
        found = [rows if rows.is_floating_point() else self.lookup(rows[None])[0] for rows in prompts]
        return torch.cat([rows.to(found[-1].dtype) for rows in found]) if found else None


def store(model: nn.Module, site: EntrySite) -> None:
    """Compute the keys and values of the prompts that are kept, and write them into the buffers of each attention call.

    Each is read behind prefixes and those before it, and in front of every other prompt.
    """
    module = model.get_submodule(site.path)
    (front,) = (hook for hook in module._forward_pre_hooks.values() if isinstance(hook, soft.Front))
    entry: Any = module._modules[soft.CHILD]
    waiting = {of: rows.shape[0] for _, of, rows in entry()}
    was = {each: each.training for each in module.modules()}
    try:
        with torch.no_grad():
            module.eval()
            for prompt in sorted(entry(), key=soft.order):
                if prompt[1] in front.stored:
                    front.read(module, [prompt], waiting, {})
                    _write(front, prompt[1])
                    del waiting[prompt[1]]
    finally:
        for each, training in was.items():
            each.training = training


def _write(front: soft.Front, of: str) -> None:
    for site in front.sites:
        for name, states in site.named_children():
            if isinstance(states, soft.States) and states.of == of:
                assert states.kept.pair is not None
                stem = name.removesuffix("_states")
                for last, computed in zip(("key", "value"), states.kept.pair, strict=True):
                    site.get_buffer(f"{stem}_{last}").copy_(computed)
                states.kept.pair = None
