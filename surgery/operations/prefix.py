"""Prefix tuning: trained keys and values in front of every layer's own (Li & Liang 2021; gated: Zhang et al. 2023)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from surgery.errors import PlanError
from surgery.language.selector import Role, Selector
from surgery.lazy import functional, lazy, torch
from surgery.operations.base import (
    Count,
    Flag,
    Operation,
    Phase,
    Start,
    Text,
    Variant,
    flag,
    option,
    payload,
    quantity,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from torch import Generator, Tensor
    from torch.fx import Node

    from surgery.anatomy.parts import Anatomy, Kind, Part
    from surgery.graph import attention_cache, attention_text, entry, once
    from surgery.graph.attention import AttentionSite
else:
    attention_cache = lazy("surgery.graph.attention_cache")
    attention_text, entry = lazy("surgery.graph.attention_text"), lazy("surgery.graph.entry")
    once = lazy("surgery.graph.once")


@dataclass(frozen=True, kw_only=True)
class Prefix(Operation):
    """Prefix tuning (Li & Liang 2021): K' = [P_K; K], V' = [P_V; V] in every layer, seen by every query.

    Tokens stand at positions n, n + 1, ... as if n others came first; biases by relative position go on in front of the
    first token, padding not counted. Where attention has a window, a prefix is seen from behind it too; one that starts
    from a text is seen as the text would be. `on cross` puts it in front of the encoder's states, where nothing moves.
    `gated` (LLaMA-Adapter, Zhang et al. 2023) leaves the model's own attention alone: out + tanh(g) softmax(q P_K^T)
    P_V, one g per head, 0 at the start; positions stay. Of `init text`, the token ids are the text's own, without
    special tokens; they are repeated or cut to fill n.
    A model that computes its attention itself takes a prefix through its cache, without a gate: the plan says so.
    """

    verb: ClassVar[str] = "prefix"
    phase: ClassVar[Phase] = "attach"
    acts_on: ClassVar[tuple[Kind, ...]] = ("attention",)
    default_selector: ClassVar[Selector | None] = Role("layers")

    positions: Count | None = quantity(
        "positions in front of the tokens; of a text, as many as it has tokens", default=None, at_least=1
    )
    via: Variant | None = option(
        "train the keys and values through a network with this bottleneck; a merge leaves them as they are",
        default=None,
        choices={"mlp": payload(Count, default=512, at_least=1)},
    )
    gated: Flag = flag("start as no change, and learn how much of the prefix each head takes")
    init: Variant | None = option(
        "what the keys and values start as: small numbers, or those of a text (repeated or cut to fit the positions)",
        default=None,
        choices={"normal": None, "text": payload(Text)},
    )

    @property
    def text(self) -> str | None:
        """The text whose keys and values are the start."""
        return str(self.init.value) if self.init is not None and self.init.word == "text" else None

    @property
    def bottleneck(self) -> int:
        """Width of the network that makes the prefix; 0 without one."""
        return int(str(self.via.value)) if self.via is not None else 0

    @property
    def needs_text(self) -> bool:
        return self.text is not None

    def validate(self) -> Iterable[tuple[str, str, str]]:
        if self.positions is None and self.text is None:
            yield "positions", "`prefix` does not say how many positions", "write `prefix 20`"
        if self.via is not None and self.text is not None:
            yield "init", "`init text` sets keys and values, which `via mlp` computes", "take one of them"
        if self.text is not None and not self.text:
            yield "init", "the text is empty", "leave `init` out"

    def fits(self, part: Part) -> str | None:
        return "its number of heads is not known" if part.heads is None else None

    def promises(self) -> tuple[str, ...]:
        if self.gated:
            return ("identity_at_init", "off_means_off")
        return ("off_means_off", *(("soft_equals_hard",) if self.text is not None else ()))

    @property
    def on_merge(self) -> str:
        return "becomes plain keys and values" if self.via is not None else "stays"

    @property
    def shared_by_rows(self) -> str | None:
        return None if self.gated else "it moves the positions and lengthens the keys of every row"

    def warnings(self, parts: Sequence[Part], anatomy: Anatomy, model: Any) -> Iterable[str]:
        if not self.gated:
            lengths = {part.path: self.positions or 0 for part in parts if part.role != "cross"}
            yield from entry.check(model, anatomy.parts, lengths)
        reason = attention_text.unlike_a_prompt(model, anatomy) if self.text is not None else ""
        if reason:
            yield f"the text as a prefix is not the text as a prompt: {reason}"
        own = [part.path for part in parts if attention_cache.through_cache(model.get_submodule(part.path))]
        if own:
            yield f"the model computes its attention itself: the prefix goes in through its cache ({_places(own)})"

    @property
    def starts_from(self) -> Start:
        return "chance" if self.text is None else "model"

    def place_in_front(self, name: str | None) -> tuple[int, str]:
        return -100, ""  # before all that tokens are read from, which see it

    def claims(self, name: str | None) -> tuple[str, ...]:
        return (f"keys and values under the name {name or 'default'}",)

    def read(self, tokenizer: Any) -> Prefix:
        """The operation with its positions counted; token ids are the text's own, without special tokens."""
        if self.text is None or self.positions is not None:
            return self
        return replace(self, positions=len(self.ids(tokenizer)))

    def ids(self, tokenizer: Any) -> Sequence[int]:
        return () if self.text is None else attention_text.token_ids(tokenizer, self.text)

    def rewrite(self, site: AttentionSite) -> None:
        if self.positions is None:
            raise PlanError.of(
                "S347",
                f"`{self}` takes as many positions as its text has tokens, and there is no tokenizer to count them",
                help="give the number of positions, or a tokenizer",
            )
        key, value = self._through_mlp(site) if self.via is not None else self._directly(site)
        if self.gated:
            gate = site.parameter("prefix_gate", (site.heads.query,))
            site.attend_beside(key, value, gate)
        else:
            site.put_in_front(key, value, self.positions, windowed=self.text is not None)

    def _directly(self, site: AttentionSite) -> tuple[Node, Node]:
        heads, n = site.heads, self.positions or 0
        key = site.parameter("prefix_key", (heads.key_value, n, heads.key_width), small)
        return key, site.parameter("prefix_value", (heads.key_value, n, heads.value_width), small)

    def _through_mlp(self, site: AttentionSite) -> tuple[Node, Node]:
        """P = W2 tanh(W1 E + b1) + b2: E, W1 and b1 are one for all layers, W2 and b2 the layer's own rows."""
        heads, n = site.heads, self.positions or 0
        bottleneck, width = self.bottleneck, heads.key_width + heads.value_width
        embedding = site.shared("prefix_embedding", (n, site.width), standard)
        trunk = site.shared("prefix_trunk_weight", (bottleneck, site.width), kaiming)
        offset = site.shared("prefix_trunk_bias", (bottleneck,))
        weight = site.parameter("prefix_mlp_weight", (heads.key_value * width, bottleneck), kaiming)
        bias = site.parameter("prefix_mlp_bias", (heads.key_value * width,))
        hidden = site.call(once.tanh_linear, embedding, trunk, offset)
        both = site.call(attention_text.by_head, site.call(functional.linear, hidden, weight, bias), heads.key_value)
        key = site.folds_to("prefix_key", site.call(torch.narrow, both, 2, 0, heads.key_width))
        value = site.folds_to("prefix_value", site.call(torch.narrow, both, 2, heads.key_width, heads.value_width))
        return key, value

    def finish(self, sites: Sequence[AttentionSite], context: Any) -> None:
        """Set the keys and values to those of the text, as the transformed model without this prefix computes them."""
        if self.text is None or not sites:
            return
        ids = attention_text.token_ids(context.tokenizer, self.text)
        filled = attention_text.fill_up(ids, self.positions or len(ids))
        computed = attention_text.keys_and_values(context.model, filled, sites, sites[0].name)
        for site, (key, value) in zip(sites, computed, strict=True):
            site.data("prefix_key").data.copy_(key)
            site.data("prefix_value").data.copy_(value)

    def folded(self) -> Prefix:
        """What the statement is after a merge: plain keys and values."""
        return replace(self, via=None)


def _places(paths: Sequence[str]) -> str:
    return paths[0] + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")


def small(tensor: Tensor, generator: Generator) -> None:
    """Standard deviation 0.02, as the embeddings of the models that prefixes were first used on."""
    torch.nn.init.normal_(tensor, std=0.02, generator=generator)


def standard(tensor: Tensor, generator: Generator) -> None:
    """Standard deviation 1, as torch's own embeddings start."""
    torch.nn.init.normal_(tensor, generator=generator)


def kaiming(tensor: Tensor, generator: Generator) -> None:
    """Uniform in +-1/sqrt(in), as torch's own linear maps start."""
    torch.nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
