"""Few-shot prompting: worked examples in front of every input (Brown et al. 2020)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from surgery.errors import PlanError
from surgery.operations.base import Count, File, Text, option, quantity
from surgery.operations.hard import Hard, Message

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from surgery.anatomy.parts import Anatomy, Part

KEYS = ("input", "output")


@dataclass(frozen=True, kw_only=True)
class Shots(Hard):
    """The first n examples of a JSONL file in front of every input, each as the template writes it, one a line.

    Each line of the file is an object with `input` and `output`. Where the tokenizer has a chat template, the part of
    the template in front of `{output}` is the user's turn and the rest the assistant's (the turns alone: what opens a
    conversation is left to `instruct`); elsewhere, or with `plain`, they are text. Write what you ask the model the way
    the template begins. No weight changes; `cached` as with `instruct`.
    """

    verb: ClassVar[str] = "shots"
    order: ClassVar[int] = 3

    count: Count = quantity("how many examples", at_least=1)
    from_: File = option("JSONL file with `input` and `output` in each line")
    template: Text = option("what an example looks like, with {input} and {output}", default="{input} => {output}")

    def validate(self) -> Iterable[tuple[str, str, str]]:
        for key in KEYS:
            if f"{{{key}}}" not in self.template:
                yield "template", f"the template has no {{{key}}}", 'write it like `template "{input} => {output}"`'
        if all(f"{{{key}}}" in self.template for key in KEYS) and self.template.index("{output}") < self.template.index(
            "{input}"
        ):
            yield "template", "the template has {output} before {input}", 'write it like `"{input} => {output}"`'

    def warnings(self, parts: Sequence[Part], anatomy: Anatomy, model: Any) -> Iterable[str]:
        self.examples()
        yield from super().warnings(parts, anatomy, model)

    def examples(self) -> list[Mapping[str, str]]:
        """The examples. PlanError S113 for a file that has too few, or a line (by number) that is none."""
        found: list[Mapping[str, str]] = []
        for number, line in enumerate(_lines(self.from_), 1):
            if len(found) == self.count:
                break
            if line.strip():
                found.append(_example(line, f"{self.from_}:{number}"))
        if len(found) < self.count:
            raise PlanError.of(
                "S113",
                f"`shots {self.count}`, but {self.from_} has {len(found)} example{'s' * (len(found) != 1)}",
                help=f"take {len(found)}" if found else "write one object with `input` and `output` in each line",
            )
        return found

    def words(self) -> str:
        return "".join(f"{written(self.template, example)}\n" for example in self.examples())

    def chat(self) -> tuple[Message, ...]:
        asked, _, answered = self.template.partition("{output}")
        messages: list[Message] = []
        for example in self.examples():
            messages.append({"role": "user", "content": written(asked, example)})
            messages.append({"role": "assistant", "content": written("{output}" + answered, example)})
        return tuple(messages)

    def chat_text(self, render: Any) -> str:
        """The turns alone: what a template puts in front of a conversation is left to `instruct`."""
        messages = self.chat()
        once, twice = render(messages), render((*messages, *messages))
        return str(twice[len(once) :] if twice.startswith(once) else once)


def written(template: str, example: Mapping[str, str]) -> str:
    """A template with its places filled in, once: what an example says is never a place."""
    return re.sub(r"\{(input|output)\}", lambda place: example[place[1]], template)


def _lines(path: Path) -> Iterator[str]:
    try:
        yield from path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise PlanError.of("S113", f"cannot read {path}: {reason}", help="give the path of a JSONL file") from None


def _example(line: str, where: str) -> Mapping[str, str]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise PlanError.of("S113", f"{where}: no JSON: {error.msg} at column {error.colno}") from None
    missing = [key for key in KEYS if not isinstance(value, dict) or key not in value]
    if missing:
        raise PlanError.of(
            "S113",
            f"{where}: no `{'` and no `'.join(missing)}`",
            help='each line is an object like {"input": "sea otter", "output": "loutre de mer"}',
        )
    wrong = [key for key in KEYS if not isinstance(value[key], (str, int, float))]
    if wrong:
        raise PlanError.of("S113", f"{where}: `{wrong[0]}` is neither a text nor a number")
    return {key: str(value[key]) for key in KEYS}
