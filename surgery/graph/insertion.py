"""Soft rows in front of the tokens of a bidirectional encoder (prompt tuning, Lester et al. 2021, on encoders).

The model is called as with a text that has n tokens more: where it takes token numbers, n placeholders come first, and
its masks, positions and token types grow with them. Where the placeholders' word embeddings leave the lookup, the rows
take their place. So the model counts positions and distances itself, whatever its family, and a row that is the
embedding of a word gives what that word gives. Behind the last layer the rows' places are cut out again, so that
poolers, heads and labels see the caller's tokens only, unless a decoder attends to the encoder's output: then they
stay, and the mask that the decoder is given grows instead.

All hidden states lose the rows' places too; attention weights keep them, since their rows sum to one with them. A model
that masks its tokens once more behind the last layer, in the very module that embeds them, sees a mask that is longer
than they are, and fails. One call of a model at a time: threads need copies of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import GraphError
from surgery.graph.hooks import drop
from surgery.graph.insertion_entrance import STATES, Entrance
from surgery.graph.insertion_layout import Layout, extended, is_mask, marks_padding

MASKS = ("encoder_attention_mask", "encoder_padding_mask", "memory_key_padding_mask", "memory_mask")
MARK = "_insertion_layout"

Rows = Callable[[], Tensor | None]


@dataclass
class Call:
    """One call of the root that is under way."""

    layout: Layout
    rows: Tensor
    entered: bool = False
    left: bool = False


class Insertion:
    """Puts rows in front of the tokens of one encoder, by hooks on the model's own modules.

    rows: gives (n, width), or (batch, n, width) for rows that differ over the batch, in any floating dtype; or None,
        or no rows, to leave the model as it is. Asked once for each call of the encoder, so it may be a network.
    enabled: False leaves the model alone, to the bit.

    One insertion for an encoder: to put several prompts there, let `rows` concatenate them. It holds no module, so a
    deep copy of the model has a copy of it, whose rows are those of the copied model if `rows` is a bound method of a
    module in it (or an object that holds one). Hooks are not saved: `install` again after loading or replacing modules.
    """

    def __init__(self, entrance: Entrance, rows: Rows) -> None:
        self.entrance, self.rows, self.enabled = entrance, rows, True
        self.names: tuple[str, ...] = ()
        self.call: Call | None = None

    def install(self, model: nn.Module) -> None:
        """Set the hooks; repeat it after modules were replaced."""
        self.remove(model)
        at = self.entrance
        root = model.get_submodule(at.root)
        self.names = tuple(inspect.signature(root.forward).parameters)
        root.register_forward_pre_hook(self.enter, with_kwargs=True)
        model.get_submodule(at.lookup).register_forward_hook(self.give)
        if not at.keeps:
            model.get_submodule(at.leave).register_forward_hook(self.cut, with_kwargs=True)
        root.register_forward_hook(self.finish, always_call=True)
        for path in at.readers:
            reader = model.get_submodule(path)
            names = tuple(inspect.signature(reader.forward).parameters)
            reader.register_forward_pre_hook(Reader(self, names), with_kwargs=True)

    def remove(self, model: nn.Module) -> None:
        """Take the hooks away."""
        remove(model, self)

    # The hooks, in the order in which they run

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Placeholders in front of the tokens, and all that goes with tokens longer by as much."""
        rows = self.rows() if self.enabled else None
        self.call = None
        if rows is None or rows.shape[-2] == 0:
            return None
        rows = rows if rows.dim() == 3 else rows[None]
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        name, tokens = self._tokens(given)
        mask = next((each for each in given if is_mask(each) and isinstance(given[each], Tensor)), "")
        layout = Layout.behind(rows.shape[1], tokens.shape[1], given.get(mask), marks_padding(mask))
        room = self.entrance.room
        if room is not None and layout.n + layout.length > room:
            raise GraphError.of(
                "S393",
                f"{layout.n} rows in front of {layout.length} tokens are more than the model's {room} positions",
                help=f"cut the text to {room - layout.n} tokens",
            )
        changed = {each: extended(each, value, layout, len(tokens)) for each, value in given.items() if each != name}
        self.call = Call(layout, rows, entered=tokens.is_floating_point())
        if tokens.is_floating_point():
            changed[name] = layout.put(rows.to(tokens.dtype), tokens)
        else:
            changed[name] = layout.put(tokens.new_full((1, layout.n), self.entrance.placeholder), tokens)
        named = self.names[: len(args)]
        return tuple(changed[each] for each in named), {each: changed[each] for each in kwargs}

    def give(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """The rows where the placeholders' word embeddings are."""
        call = self.call
        if call is None or call.entered or not call.layout.fits(output):
            return None
        call.entered = True
        return call.layout.replace(call.rows.to(output.dtype), output)

    def cut(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """What the last layer gives, without the rows' places."""
        layout = self._layout((*args, *kwargs.values()))
        if layout is None:
            return None
        if self.call is not None:
            self.call.left = True
        if isinstance(output, dict):
            name = next(iter(output))
            output[name] = self._cut(output[name], layout)
            return layout.cut_nested(output)
        if isinstance(output, tuple):
            return layout.cut_nested((self._cut(output[0], layout), *output[1:]))
        return self._cut(output, layout)

    def finish(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """What the root gives, after the last look at it; also runs when the root has failed."""
        call, self.call = self.call, None
        if call is None or output is None:
            return None
        if not call.entered or not (call.left or self.entrance.keeps):
            at = self.entrance
            raise GraphError.of(
                "S394",
                f"rows did not {'leave' if call.entered else 'enter'} where they should"
                f" ({at.leave if call.entered else at.lookup})",
                help="the model does not run its layers as a list of them suggests; take `prefix` instead",
            )
        return None if self.entrance.keeps else call.layout.cut_nested(output)

    # What they use

    def _tokens(self, given: dict[str, Any]) -> tuple[str, Tensor]:
        """The argument with token numbers (batch, length), or else with embeddings (batch, length, width)."""
        for floating, dim in ((False, 2), (True, 3)):
            for name in (*self.names, *given):
                value = given.get(name)
                if is_mask(name) or name.startswith("encoder_") or not isinstance(value, Tensor):
                    continue
                if (value.dim(), value.is_floating_point()) == (dim, floating) and value.dtype != torch.bool:
                    return name, value
        raise GraphError.of(
            "S394",
            f"no token numbers (batch, length) among what {self.entrance.root or 'the model'} is called with",
            help="call it with a batch of token numbers, or of embeddings",
        )

    def _layout(self, arguments: tuple[Any, ...]) -> Layout | None:
        """That of the call under way; of one that is over, when a checkpoint runs the last layer again for gradients.

        The memory of the tensor that the layer is called with remembers it: checkpoints keep that very memory.
        """
        call = self.call
        if torch.compiler.is_compiling():
            return None if call is None else call.layout
        first = next((each for each in arguments if isinstance(each, Tensor)), None)
        if call is None:
            layout: Layout | None = None if first is None else getattr(first.untyped_storage(), MARK, None)
            return layout
        if first is not None and first.requires_grad:
            setattr(first.untyped_storage(), MARK, call.layout)
        return call.layout

    def _cut(self, value: Any, layout: Layout) -> Tensor:
        if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[1] < layout.n + layout.length:
            raise GraphError.of(
                "S394",
                f"the output of {self.entrance.leave} is no tensor with a place for each row and token",
                help="layers that shorten the sequence, turn it, or give lists take no rows in front; try `prefix`",
            )
        return layout.cut(value)


@dataclass
class Reader:
    """A forward pre-hook on what reads the encoder's output: its mask for that grows by the rows' places."""

    insertion: Insertion
    names: tuple[str, ...]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        states = next((given[name] for name in STATES if given.get(name) is not None), None)
        name = next((name for name in MASKS if isinstance(given.get(name), Tensor)), "")
        if not self.insertion.enabled or states is None or not name:
            return None
        mask = given[name]
        n = states.shape[1] - mask.shape[-1]
        if n <= 0:
            return None
        padding = marks_padding(name)
        given[name] = Layout.behind(n, mask.shape[-1], mask, padding).mask(mask, padding)
        return tuple(given[each] for each in self.names[: len(args)]), {each: given[each] for each in kwargs}


def remove(model: nn.Module, insertion: Insertion | None = None) -> None:
    """Take the hooks of an insertion away, or of every one."""

    def ours(hook: Any) -> bool:
        owner = hook.insertion if isinstance(hook, Reader) else getattr(hook, "__self__", None)
        return isinstance(owner, Insertion) and insertion in (None, owner)

    drop(model, ours)


__all__ = ["Call", "Entrance", "Insertion", "Reader", "remove"]
