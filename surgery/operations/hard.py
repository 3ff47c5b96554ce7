"""Discrete prompts: texts whose tokens come in front of every input. They change no weight and train none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from surgery.errors import PlanError
from surgery.lazy import lazy, torch
from surgery.operations.base import Count, Flag, Start, flag, option
from surgery.operations.front import Front

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

    from torch import Tensor
    from torch.fx import Node
    from typing_extensions import Self

    from surgery.anatomy import entries
    from surgery.anatomy.parts import Anatomy, Part
    from surgery.graph import attention_text, soft_entry
    from surgery.graph.soft_entry import EntrySite
else:
    attention_text, entries = lazy("surgery.graph.attention_text"), lazy("surgery.anatomy.entries")
    soft_entry = lazy("surgery.graph.soft_entry")

Message = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Hard(Front):
    """A text in front of every input, as token numbers that the model reads itself."""

    tokens: Count | None = option("how many tokens the text has; counted when it is read", default=None, at_least=1)
    plain: Flag = flag("the text as it stands, also where the tokenizer has a chat template")
    cached: Flag = flag("compute its keys and values once, and keep them with the model")

    @property
    def length(self) -> int | None:
        return self.tokens

    @property
    def stored(self) -> bool:
        return self.cached

    @property
    def needs_text(self) -> bool:
        return True

    @property
    def on_merge(self) -> str:
        return "stays"

    @property
    def starts_from(self) -> Start:
        return "model" if self.cached else "chance"

    def words(self) -> str:
        """The text, where there is no chat."""
        raise NotImplementedError

    def chat(self) -> tuple[Message, ...]:
        """The same as messages of a chat."""
        raise NotImplementedError

    def chat_text(self, render: Any) -> str:
        """What the messages come to. render: from messages to text."""
        return str(render(self.chat()))

    def hard(self, tokenizer: Any) -> list[int]:
        """The token numbers. GraphError S348 when there are none, PlanError S113 when a template refuses."""
        if self.plain or not getattr(tokenizer, "chat_template", None):
            return attention_text.token_ids(tokenizer, self.words())
        return attention_text.token_ids(tokenizer, self.chat_text(lambda messages: rendered(tokenizer, messages)))

    def counted(self, tokenizer: Any) -> list[int]:
        """The token numbers, as many as the statement says. PlanError S124 when it says another number."""
        found = self.hard(tokenizer)
        if self.tokens not in (None, len(found)):
            raise PlanError.of(
                "S124",
                f"`{self.verb}` says `tokens {self.tokens}`, and its text has {len(found)}",
                help="leave `tokens` out, which is counted when the text is read",
            )
        return found

    def ids(self, tokenizer: Any) -> Sequence[int]:
        return self.hard(tokenizer)

    def read(self, tokenizer: Any) -> Self:
        return replace(self, tokens=len(self.counted(tokenizer)))

    def _at(self, place: Part, parts: Sequence[Part], anatomy: Anatomy, model: Any) -> Iterable[str]:
        across = any(part.role == "cross" and part.stack == place.stack for part in anatomy.parts)
        if self.cached and across:
            raise PlanError.of(
                "S112",
                f"`{self.verb} cached` cannot keep what a decoder computes: it depends on what the encoder has read",
                help="leave `cached` out",
            )
        yield from super()._at(place, parts, anatomy, model)

    def promises(self) -> tuple[str, ...]:
        return (*super().promises(), "soft_equals_hard")

    def rows(self, site: EntrySite) -> Node:
        return site.buffer(f"{self.verb}_tokens", torch.zeros(self.length or 0, dtype=torch.long))

    def fill(self, sites: Sequence[Any], context: Any) -> None:
        """Write the token numbers."""
        for site in (each for each in sites if each.part.kind == "entry"):
            found: Tensor = torch.tensor(self.counted(context.tokenizer))
            site.data(f"{self.verb}_tokens").copy_(found)

    def finish(self, sites: Sequence[Any], context: Any) -> None:
        """Compute the keys and values that are kept."""
        for site in (each for each in sites if each.part.kind == "entry" and self.cached):
            soft_entry.store(context.model, site)


def rendered(tokenizer: Any, messages: Sequence[Message]) -> str:
    """Messages as the tokenizer's chat template writes them. PlanError S113 when it refuses them."""
    try:
        text: str = tokenizer.apply_chat_template([dict(each) for each in messages], tokenize=False)
    except Exception as error:
        roles = ", ".join(dict.fromkeys(each["role"] for each in messages))
        raise PlanError.of(
            "S113",
            f"the tokenizer's chat template refuses messages of {roles}: {error}",
            help="say `plain` to take the text as it stands",
        ) from None
    return text
