"""Prompts in front of a causal stack: n rows are read first, and their keys and values come in front everywhere.

What a causal model computes of its first n inputs does not depend on what follows. So a prompt is a prefix whose keys
and values the model itself computes: before the model runs, its stack reads the rows alone, in one row of a batch; each
attention call keeps their keys and values, with gradient, and puts them in front as it does with any prefix. Masks,
padding, caches, positions, labels and logits see nothing of it. In training, a plain call reads both in one pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from surgery.anatomy.parts import Anatomy, Part
from surgery.errors import GraphError
from surgery.graph import soft_together
from surgery.graph.entry import Amounts, Shifting
from surgery.graph.hooks import drop
from surgery.graph.soft_together import Together

CHILD = "surgery_prompt"
TOKENS, EMBEDDINGS = "input_ids", "inputs_embeds"
BESIDE = ("encoder_hidden_states", "encoder_attention_mask")
"""What a decoder reads beside its tokens: its prompt reads it too."""


@dataclass
class Reading:
    """Which prompt of a stack is read now, and which are not in front yet; shared by all of the stack's calls.

    rows: what the lookup gives instead of embeddings, where the stack takes no embeddings itself.
    """

    now: str | None = None
    waiting: frozenset[str] = frozenset()
    rows: Tensor | None = None

    @property
    def busy(self) -> bool:
        return self.now is not None


class Kept:
    """Keys and values of the last reading; a copy of the model, or a pickle, begins without."""

    def __init__(self) -> None:
        self.pair: tuple[Tensor, Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()


class States(nn.Module):
    """Keys and values of one prompt at one attention call: (key-value heads, n, width), or one for each row of a batch.

    of: the prompt's name at its entry. heads: key-value heads. stored: it is called with what it is to give.
    """

    def __init__(self, of: str, heads: int, stored: bool) -> None:
        super().__init__()
        self.of, self.heads, self.stored = of, heads, stored
        self.reading, self.kept = Reading(), Kept()

    def forward(self, key: Tensor, value: Tensor, *stored: Tensor) -> tuple[Tensor, ...]:
        """What to put in front of these keys and values of the tokens: nothing while this is not in front yet."""
        if self.of in self.reading.waiting:
            key, value = alone(key, self.heads), alone(value, self.heads)
            if self.reading.now == self.of:
                self.kept.pair = (key, value)
            return key[..., :0, :], value[..., :0, :]
        if stored:
            return stored
        if self.kept.pair is None:
            raise GraphError.of(
                "S366",
                "an attention call ran without the model around it, and its prompt was not read",
                help="run the whole model, or a gradient checkpoint of its layers",
            )
        if self.training and self.kept.pair[0].requires_grad and not torch.is_grad_enabled():
            raise GraphError.of(
                "S367",
                "a reentrant gradient checkpoint cuts off the prompt that its layer attends to",
                help="take the other kind: `use_reentrant=False`",
            )
        return self.kept.pair


def alone(states: Tensor, heads: int) -> Tensor:
    """The key-value heads of a batch's only row, or of its rows; heads repeated for groups of queries once."""
    if states.dim() == 3:
        return states[:: states.shape[0] // heads]
    states = states[:, :: states.shape[1] // heads]
    return states[0] if states.shape[0] == 1 else states


def length(states: Tensor) -> int:
    """Positions of a prefix (heads, n, width)."""
    return states.shape[-2]


def nothing() -> tuple[()]:
    """No prompts: what an entry's graph starts from."""
    return ()


def appended(prompts: tuple[Any, ...], of: str, rank: int, rows: Tensor) -> tuple[Any, ...]:
    """One prompt more. rows: (n, width), or (n,) token numbers; rank: lower ones are read first."""
    return (*prompts, (rank, of, rows))


@dataclass
class Front:
    """A forward pre-hook on the module that runs a stack: lets it read its prompts before anything else.

    names: of the module's arguments. sites: its attention calls. amounts: by which positions are shifted for them.
    signature: of the weights that the kept keys and values were computed with. asked: the last prompt is read even if
    all of it is kept, for what it says of the first token. together: reads them in one pass with the tokens.
    """

    reading: Reading
    names: tuple[str, ...]
    states: list[States]
    sites: list[Shifting]
    amounts: list[Amounts]
    signature: tuple[Any, ...] = ()
    stored: frozenset[str] = field(default_factory=frozenset)
    asked: bool = False
    together: Together | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.reading.busy:
            return None
        if self.reading.waiting:
            self._set(None, {})
        if self.together is not None:
            self.together.forget()
        entry: Any = module._modules[CHILD]
        found = sorted(entry(), key=order)
        prompts = [prompt for prompt in found if prompt[1] not in self.stored] or found[-1:] * self.asked
        if not prompts:
            return None
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if self._goes_on(given):
            signature = self._signature(module, prompts)
            if signature == self.signature:
                return None
        waiting = {of: rows.shape[0] for _, of, rows in prompts}
        kept = prompts[-1][1] in self.stored
        if self.together is not None and not kept and self.together.takes(module, given, prompts):
            self._set(None, waiting)  # until the next call, for checkpoints that run layers again
            self.signature = ()
            return self.together.enter(args, given, prompts, self.asked)
        self.read(module, prompts, waiting, {name: given[name] for name in BESIDE if given.get(name) is not None})
        self.signature = () if torch.compiler.is_compiling() else self._signature(module, prompts)
        return None

    def read(
        self, module: nn.Module, prompts: list[tuple[int, str, Tensor]], waiting: dict[str, int], beside: dict[str, Any]
    ) -> None:
        """Let the stack read each prompt behind those before it. waiting: positions of all that are not in front yet.

        beside: what else the stack reads.
        """
        try:
            with unchecked(module):
                for _, of, rows in prompts:
                    self._set(of, waiting)
                    self._run(module, rows, beside)
                    waiting = {each: n for each, n in waiting.items() if each != of}
        finally:
            self._set(None, {})
            self.reading.rows = None

    def _set(self, now: str | None, waiting: dict[str, int]) -> None:
        less = sum(waiting.values())
        self.reading.now, self.reading.waiting = now, frozenset(waiting)
        for amounts in self.amounts:
            amounts.less = less
        for site in self.sites:
            object.__setattr__(site, "less", less)

    def _run(self, module: nn.Module, rows: Tensor, beside: dict[str, Any]) -> None:
        keywords: dict[str, Any] = {"use_cache": False} if "use_cache" in self.names else {}
        batch = next((each.shape[0] for each in beside.values()), 1)
        rows = rows.expand(batch, *rows.shape).clone()  # models may scale what they are given in place
        if rows.is_floating_point():
            rows = rows.to(lookup_dtype(module))
        self.reading.rows = None
        if not rows.is_floating_point():
            tokens: Tensor = rows
        elif EMBEDDINGS in self.names:
            module(**{EMBEDDINGS: rows}, **beside, **keywords)
            return
        else:
            self.reading.rows = rows
            tokens = torch.zeros(rows.shape[:2], dtype=torch.long, device=rows.device)
        if TOKENS in self.names:
            module(**{TOKENS: tokens}, **beside, **keywords)
        else:
            module(tokens, **beside, **keywords)

    def _goes_on(self, given: dict[str, Any]) -> bool:
        """Whether this is a later step over a cache, for which the prompts were read at the first."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return False
        return goes_on(given.get("past_key_values"))

    def _signature(self, module: nn.Module, prompts: list[tuple[int, str, Tensor]]) -> tuple[Any, ...]:
        versions = tuple(0 if each.is_inference() else each._version for each in module.parameters())
        on = tuple(of for _, of, _ in prompts)
        return torch.is_grad_enabled(), versions, on, tuple(site.off for site in self.sites)


def order(prompt: tuple[int, str, Tensor]) -> tuple[int, str]:
    """Which of several prompts comes first."""
    return prompt[:2]


def goes_on(cache: Any) -> bool:
    """Whether a model that is called with this cache has read tokens before."""
    return cache is not None and (not hasattr(cache, "get_seq_length") or bool(cache.get_seq_length() > 0))


def lookup_dtype(module: nn.Module) -> torch.dtype:
    """What the embeddings of a stack are."""
    return module._modules[CHILD].computes  # type: ignore[union-attr,return-value]


@contextmanager
def unchecked(module: nn.Module) -> Iterator[None]:
    """Without gradient checkpoints: a prompt is short, and reading it again in a backward pass would read tokens."""
    if not (module.training and torch.is_grad_enabled()):
        yield
        return
    held = [each for each in module.modules() if getattr(each, "gradient_checkpointing", False)]
    for each in held:
        each.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for each in held:
            each.gradient_checkpointing = True  # type: ignore[assignment]


@dataclass
class Substitute:
    """A forward hook on a lookup: while a prompt is read, its rows are what the lookup gives."""

    reading: Reading

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        rows = self.reading.rows
        return None if rows is None else rows.to(output.dtype)


def remove(model: nn.Module) -> None:
    """Take the hooks of prompts away."""
    drop(model, _ours)


def _ours(hook: Any) -> bool:
    return isinstance(hook, (Front, Substitute)) or isinstance(getattr(hook, "__self__", None), Together)


def install_front(model: nn.Module, anatomy: Anatomy, path: str, lookup: Part) -> Front:
    """Let the module at a path read its prompts. Repeat it after every change of its attention calls."""
    module = model.get_submodule(path)
    sites = [each for each in module.modules() if isinstance(each, Shifting)]
    states = [each for site in sites for each in site.modules() if isinstance(each, States)]
    reading = Reading()
    for each in states:
        each.reading = reading
    amounts = list({id(each): each for site in sites for _, each in site.informed}.values())
    names = tuple(inspect.signature(module.forward).parameters)
    stored = frozenset(each.of for each in states if each.stored)
    together = soft_together.install(model, anatomy, path, lookup, names)
    front = Front(reading, names, states, sites, amounts, stored=stored, together=together)
    module.register_forward_pre_hook(front, with_kwargs=True, prepend=True)  # before positions are counted
    if EMBEDDINGS not in names:
        module.get_submodule(_below(lookup.path, path)).register_forward_hook(Substitute(reading))
    return front


def _below(path: str, above: str) -> str:
    return path[len(above) + 1 :] if above else path
