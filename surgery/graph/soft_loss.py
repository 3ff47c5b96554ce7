"""The loss behind a prompt: its last position predicts the first token, as if it had been written there.

A model that is called with `labels` for its tokens computes a loss of its own, in which no position comes before the
first token. With a prompt one does: the stack gives out a state more, labels have a place more that is not counted,
head and loss are the model's own, and the logits lose the place again. The state is that of the prompt's last position,
and stands right in front of the row's tokens: where a row has padding there, in place of its last, which nothing reads.
So the loss is that of the prompt's text in front of the tokens with labels of -100.

A number to divide by, `num_items_in_batch`, is taken as it is given. transformers' trainer leaves the first label of
each row out of it, as never predicted, and so divides by as many fewer, here as with PEFT's prompts.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.anatomy.stacks import layers_of
from surgery.graph import soft
from surgery.graph.hooks import drop
from surgery.graph.insertion_layout import Layout, is_mask, marks_padding
from surgery.graph.module import Rewritten

LABELS, IGNORED = "labels", -100
SHIFTED = ("decoder_input_ids", "shift_labels")
"""Where a model takes these, its tokens or labels are shifted already: nothing is left out."""


@dataclass
class FirstToken:
    """Hooks on one module that takes labels, and on what gives out the states of its stack.

    entry: gives the stack's prompts. named: how those are switched. names: of the module's arguments.
    layout: of the call that is under way. state: (1 or batch, 1, width), of the prompt's last position.
    """

    front: soft.Front
    entry: Rewritten
    named: frozenset[str]
    names: tuple[str, ...]
    layout: Layout | None = None
    state: Tensor | None = None

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A place more in the labels."""
        if self.front.reading.busy:
            return None
        self._forget()
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        labels = given.get(LABELS)
        if labels is None or not self._of_tokens(labels, given) or soft.goes_on(given.get("past_key_values")):
            return None
        name = next((each for each in given if is_mask(each) and isinstance(given[each], Tensor)), "")
        self.layout = Layout.behind(1, labels.shape[1], given.get(name), marks_padding(name))
        given[LABELS] = in_front(labels, self.layout)
        self.front.asked = True
        return tuple(given[each] for each in self.names[: len(args)]), {each: given[each] for each in kwargs}

    def give(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The states with that of the prompt's last position, which is kept while the prompt is read."""
        layout = self.layout
        if layout is None:
            return None
        name = next(iter(output)) if isinstance(output, dict) else 0
        states: Tensor = output if isinstance(output, Tensor) else output[name]
        if self.front.reading.busy:
            self.state = states[:, -1:]
            return None
        if self.state is None and self.front.together is not None:
            self.state, self.front.together.last = self.front.together.last, None
        if self.state is None or states.dim() != 3 or states.shape[1] != layout.length:
            return None
        longer, self.state = predicting(self.state.to(states.dtype), states, layout), None
        if isinstance(output, Tensor):
            return longer
        if isinstance(output, dict):
            output[name] = longer
            return output
        return (longer, *output[1:])

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The output without the place; also runs when the model has failed."""
        layout = self.layout
        if layout is None or self.front.reading.busy:
            return None
        self._forget()
        if isinstance(output, dict):
            for name in [name for name, value in output.items() if layout.fits(value)]:
                output[name] = output[name][:, 1:]
            return output
        if type(output) is tuple:
            return tuple(value[:, 1:] if layout.fits(value) else value for value in output)
        return output[:, 1:] if layout.fits(output) else None

    def _forget(self) -> None:
        self.layout = self.state = None
        self.front.asked = False

    def _of_tokens(self, labels: Any, given: dict[str, Any]) -> bool:
        """Whether there is a label for each token, and a prompt in front of them."""
        if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point():
            return False
        if any(given.get(name) is not None for name in SHIFTED):
            return False
        tokens = [value for name, value in given.items() if name != LABELS and not is_mask(name)]
        alike = any(isinstance(each, Tensor) and each.shape[:2] == labels.shape for each in tokens)
        return alike and not self.named <= self.entry.off


def in_front(labels: Tensor, layout: Layout) -> Tensor:
    """Labels (batch, length) as (batch, 1 + length); that of padding in front of a row is predicted by nothing."""
    first = labels[:, :1]
    if layout.left is not None:
        first = first.masked_fill(layout.left > 0, IGNORED)
    return torch.cat((torch.full_like(first, IGNORED), first, labels[:, 1:]), 1)


def predicting(state: Tensor, states: Tensor, layout: Layout) -> Tensor:
    """States (batch, length, width) as (batch, 1 + length, width): (1 or batch, 1, width) right before each row's text.

    Place 1 + i is that of token i, whose successor it predicts.
    """
    state = state.expand(len(states), -1, -1)
    longer = torch.cat((state, states), 1)
    return longer if layout.left is None else longer.scatter(1, layout.left[..., None].expand_as(state), state)


def install(model: nn.Module, path: str, layers: str, front: soft.Front) -> None:
    """Set the hooks of every module that takes labels and runs the stack, whose module is at `path`.

    layers: path of the stack's list. A module that runs the layers itself gives the state out behind the last of them.
    """
    entry = model.get_submodule(path)._modules[soft.CHILD]
    assert isinstance(entry, Rewritten)
    above = [path]
    while above[-1]:
        above.append(above[-1].rpartition(".")[0])
    for place in above:
        module = model.get_submodule(place)
        names = tuple(inspect.signature(module.forward).parameters)
        if LABELS not in names or SHIFTED[0] in names:
            continue
        first = FirstToken(front, entry, frozenset(entry.branches()), names)
        module.register_forward_pre_hook(first.begin, with_kwargs=True, prepend=True)
        module.register_forward_hook(first.end, always_call=True)
        giving = path if place != path else f"{layers}.{list(layers_of(model.get_submodule(layers)))[-1]}"
        model.get_submodule(giving).register_forward_hook(first.give)


def remove(model: nn.Module) -> None:
    """Take the hooks away."""
    drop(model, lambda hook: isinstance(getattr(hook, "__self__", None), FirstToken))


__all__ = ["FirstToken", "install", "remove"]
