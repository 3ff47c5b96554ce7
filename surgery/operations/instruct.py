"""Zero-shot prompting: an instruction in front of every input (Radford et al. 2019; Brown et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from surgery.operations.base import Text, quantity
from surgery.operations.hard import Hard, Message

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, kw_only=True)
class Instruct(Hard):
    """An instruction in front of every input, as if its tokens had been written there (zero-shot prompting).

    Where the tokenizer has a chat template, it is the system's message, and what you give the model is the turn that
    follows; elsewhere, or with `plain`, the text as it stands, without special tokens. No weight changes.
    `cached` computes its keys and values once: the same logits, and the tokens are never paid for again.
    """

    verb: ClassVar[str] = "instruct"
    order: ClassVar[int] = 2

    text: Text = quantity("the instruction")

    def validate(self) -> Iterable[tuple[str, str, str]]:
        if not self.text:
            yield "text", "the text is empty", "write what the model is to do"

    def words(self) -> str:
        return self.text

    def chat(self) -> tuple[Message, ...]:
        return ({"role": "system", "content": self.text},)
