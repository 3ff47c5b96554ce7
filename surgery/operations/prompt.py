"""Prompt tuning: trained embeddings in front of every input (Lester et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from surgery.lazy import lazy, torch
from surgery.operations.base import Count, Start, Text, Variant, option, payload, quantity
from surgery.operations.front import Front

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from torch import Generator, Tensor
    from torch.fx import Node

    from surgery.graph import attention_text
    from surgery.graph.soft_entry import EntrySite
else:
    attention_text = lazy("surgery.graph.attention_text")


@dataclass(frozen=True, kw_only=True)
class Prompt(Front):
    """Prompt tuning (Lester et al. 2021): n trained embeddings come before those of the tokens.

    A causal model reads them first, in every layer, and tokens stand at positions n, n + 1, ...; logits and labels stay
    those of the tokens, and the model's own loss counts the first token too, which the prompt predicts. An encoder has
    them in front of its tokens, and gives out the tokens' states only, unless a decoder attends to them. `init vocab`
    starts from embeddings of random words, `init text` from those of a text (its own tokens without special ones,
    repeated or cut to fill n).
    """

    verb: ClassVar[str] = "prompt"

    positions: Count | None = quantity(
        "trained embeddings in front of the tokens; of a text, as many as it has tokens", default=None, at_least=1
    )
    init: Variant | None = option(
        "what they start as: embeddings of random words (as if nothing is said), small numbers, or a text's embeddings",
        default=None,
        choices={"vocab": None, "normal": None, "text": payload(Text)},
    )

    @property
    def text(self) -> str | None:
        """The text whose embeddings are the start."""
        return str(self.init.value) if self.init is not None and self.init.word == "text" else None

    @property
    def length(self) -> int | None:
        return self.positions

    @property
    def needs_text(self) -> bool:
        return self.text is not None

    def validate(self) -> Iterable[tuple[str, str, str]]:
        if self.positions is None and self.text is None:
            yield "positions", "`prompt` does not say how many positions", "write `prompt 16`"
        if self.text is not None and not self.text:
            yield "init", "the text is empty", "leave `init` out"

    @property
    def starts_from(self) -> Start:
        return "chance" if self.init is not None and self.init.word == "normal" else "model"

    def promises(self) -> tuple[str, ...]:
        return (*super().promises(), *(("soft_equals_hard",) if self.text is not None else ()))

    def read(self, tokenizer: Any) -> Prompt:
        if self.text is None or self.positions is not None:
            return self
        return replace(self, positions=len(self.ids(tokenizer)))

    def ids(self, tokenizer: Any) -> Sequence[int]:
        return () if self.text is None else attention_text.token_ids(tokenizer, self.text)

    def rows(self, site: EntrySite) -> Node:
        return site.parameter("prompt", (self.length or 0, site.width), small)

    def finish(self, sites: Sequence[Any], context: Any) -> None:
        """Copy embeddings of random words, or of the text, as the transformed model looks them up."""
        if self.init is not None and self.init.word == "normal":
            return
        for site in (each for each in sites if each.part.kind == "entry"):
            found = site.embeddings(self._words(site, context), context)
            site.data("prompt").data.copy_(found)

    def _words(self, site: EntrySite, context: Any) -> list[int]:
        n = self.length or 0
        if self.text is not None:
            return list(attention_text.fill_up(attention_text.token_ids(context.tokenizer, self.text), n))
        drawn = torch.randperm(site.vocabulary, generator=site.generator("words"))[:n]
        return list(attention_text.fill_up(drawn.tolist(), n))


def small(tensor: Tensor, generator: Generator) -> None:
    """Standard deviation 0.02, as the embeddings of the models that prompts were first used on."""
    torch.nn.init.normal_(tensor, std=0.02, generator=generator)
