"""Prompts of a causal stack in training: read in one pass with the tokens, not before them.

Reading a prompt first, alone, takes every weight from memory once more, forward and backward, which a short batch
notices. In training nothing is kept of it, so it may as well stand in front of each row of the batch: behind padding on
the left, as in an encoder, with positions that count from its first. Behind the stack its places are cut out again.
Masks and positions are the model's own then. A call that asks for more than states (a cache, weights, all hidden
states), comes with positions of its own, or will be computed again by a gradient checkpoint is read in two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.anatomy.parts import Anatomy, Part
from surgery.errors import GraphError
from surgery.graph.insertion_entrance import ordinary
from surgery.graph.insertion_layout import Layout

TOKENS, EMBEDDINGS, MASK, CACHE = "input_ids", "inputs_embeds", "attention_mask", "use_cache"
BESIDE = ("encoder_hidden_states", "encoder_attention_mask", "return_dict")
"""Arguments that stay as they are whatever stands in front of the tokens."""
TOLD = ("output_attentions", "output_hidden_states", "output_router_logits")
"""What a configuration may ask a stack to tell of every place."""

Prompt = tuple[int, str, Tensor]
"""rank, name, rows: (n, width) embeddings, or (n,) token numbers."""


@dataclass
class Together:
    """How the module that runs a stack is called with rows in front of its tokens, and what it gives without them.

    names: of the module's arguments. placeholder: a token that stands where a row will. asked: somebody wants the
    states of the rows' last places, which are `last` then (batch, 1, width).
    """

    names: tuple[str, ...]
    placeholder: int
    layout: Layout | None = None
    rows: Tensor | None = None
    asked: bool = False
    last: Tensor | None = None

    def forget(self) -> None:
        """Nothing is left of the call before."""
        self.layout = self.rows = self.last = None

    def takes(self, module: nn.Module, given: dict[str, Any], prompts: list[Prompt]) -> bool:
        """Whether this call gives the same in one pass."""
        kinds = {rows.is_floating_point() for _, _, rows in prompts}
        if not (module.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return False
        if len(kinds) > 1 or not _only_states(module, given):
            return False
        tokens, mask = given.get(TOKENS), given.get(MASK)
        if (tokens is None) == (given.get(EMBEDDINGS) is None):
            return False
        if tokens is None:
            tokens = given[EMBEDDINGS]
            if kinds == {False}:
                return False
        return mask is None or (isinstance(mask, Tensor) and mask.shape == tokens.shape[:2])

    def enter(self, args: tuple[Any, ...], given: dict[str, Any], prompts: list[Prompt], asked: bool) -> Any:
        """The call's arguments with rows, or placeholders for them, in front of the tokens."""
        self.asked = asked
        rows = torch.cat([rows for _, _, rows in prompts])[None]
        name = TOKENS if given.get(TOKENS) is not None else EMBEDDINGS
        tokens, mask = given[name], given.get(MASK)
        self.layout = Layout.behind(rows.shape[1], tokens.shape[1], mask)
        changed = dict(given)
        if name == EMBEDDINGS:
            rows = rows.to(tokens.dtype)
        elif rows.is_floating_point():
            self.rows = rows
            rows = tokens.new_full(rows.shape[:2], self.placeholder)
        changed[name] = self.layout.put(rows, tokens)
        if mask is not None:
            changed[MASK] = self.layout.mask(mask)
        if CACHE in self.names:
            changed[CACHE] = False
        named = self.names[: len(args)]
        return tuple(changed[each] for each in named), {k: v for k, v in changed.items() if k not in named}

    def give(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """A forward hook on the lookup: the rows where the placeholders' embeddings are."""
        if self.layout is None or self.rows is None or not self.layout.fits(output):
            return None
        rows, self.rows = self.rows, None
        return self.layout.replace(rows.to(output.dtype), output)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """A forward hook on the module: its states without the rows' places."""
        layout, self.layout = self.layout, None
        if layout is None:
            return None
        states = output if isinstance(output, Tensor) else output[0]
        if self.rows is not None or not layout.fits(states):
            raise GraphError.of(
                "S394",
                f"rows in front of the tokens did not {'enter' if self.rows is not None else 'leave'}"
                f" {type(module).__name__} as it is called in training",
                help="take `prefix` instead",
            )
        self.last = layout.last(states) if self.asked else None
        states = layout.cut(states)
        if isinstance(output, Tensor):
            return states
        if isinstance(output, dict):
            output[next(iter(output))] = states
            return output
        return (states, *output[1:])


def _only_states(module: nn.Module, given: dict[str, Any]) -> bool:
    """Whether a call hands in nothing else that goes with the tokens, and gets nothing else that does."""
    known = {TOKENS, EMBEDDINGS, MASK, *BESIDE}
    if not all(name in known or _plain(value) for name, value in given.items()):
        return False
    if any(getattr(getattr(module, "config", None), name, False) for name in TOLD):
        return False
    return not any(each.__dict__.get("gradient_checkpointing") for each in module.modules())


def _plain(value: Any) -> bool:
    """Nothing, a number, or what is not asked for."""
    if isinstance(value, Tensor):
        return value.dim() == 0
    return value is None or value is False or (isinstance(value, (int, float)) and value is not True)


def install(model: nn.Module, anatomy: Anatomy, path: str, lookup: Part, names: tuple[str, ...]) -> Together | None:
    """Set the hooks on the module that runs a stack and its lookup; None where the module cannot be called so.

    Another table of as many rows would be read for the placeholders as well.
    """
    module, table = model.get_submodule(path), model.get_submodule(lookup.path)
    read = [model.get_submodule(p.path) for p in anatomy.parts if p.kind == "lookup" and p.shape[0] == lookup.shape[0]]
    others = [each for each in module.modules() if each in read or _rows(each) == lookup.shape[0]]
    if TOKENS not in names or any(each is not table for each in others):
        return None
    together = Together(names, ordinary(model, lookup))
    table.register_forward_hook(together.give)
    module.register_forward_hook(together.leave)
    return together


def _rows(module: nn.Module) -> int | None:
    return module.num_embeddings if isinstance(module, nn.Embedding) else None
