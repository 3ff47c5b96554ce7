"""Discrete prompts: examples from files, chat templates, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import surgery
from surgery.errors import SurgeryError
from tests import zoo
from tests.reference_decoder import reference_decoder

EXAMPLES = [{"input": "w5 w9", "output": "w7"}, {"input": "w15", "output": "w17 w3"}, {"input": "w4", "output": "w6"}]
CHAT = (
    "{% if messages[0].role != 'system' %}<default> {% endif %}"
    "{% for m in messages %}{{ '<' + m.role + '> ' + m.content + ' <end> ' }}{% endfor %}"
)
VOCABULARY = 51
MARKS = {"<system>": 40, "<user>": 41, "<assistant>": 42, "<end>": 43, "<default>": 44, "=>": 45}


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    path = tmp_path / "examples.jsonl"
    path.write_text("\n\n".join(map(json.dumps, EXAMPLES)) + "\n")
    return path


class Reader:
    """A tokenizer of words, and of the marks of a chat."""

    def __init__(self, chat_template: str | None = None) -> None:
        self.chat_template = chat_template

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [MARKS[word] if word in MARKS else int(word[1:]) for word in text.split()]

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
        from jinja2 import Template

        assert not tokenize
        return Template(self.chat_template or "").render(messages=messages)


@torch.no_grad()
def check(program: str, text: str, tokenizer: Reader) -> None:
    """The program is the text in front, to 1e-10."""
    model, x = reference_decoder(), zoo.tokens(VOCABULARY, 2, 6)
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    wanted = model(torch.cat((ids.expand(2, -1), x), 1))[:, ids.shape[1] :]
    surgery.apply(surgery.parse(program), model, example_inputs=(x,), tokenizer=tokenizer)
    assert (model(x) - wanted).abs().max() < 1e-10


@pytest.mark.parametrize("cached", ["", " cached"])
def test_shots_are_examples_in_front(examples: Path, cached: str) -> None:
    """Promise: the first n examples, each as the template writes it, are what the model reads first."""
    check(f'shots 2{cached} from "{examples}"', "w5 w9 => w7\nw15 => w17 w3\n", Reader())
    check(f'shots 3{cached} from "{examples}" template "{{input}} w1 {{output}} w2"',
          "w5 w9 w1 w7 w2 w15 w1 w17 w3 w2 w4 w1 w6 w2", Reader())  # fmt: skip


def test_an_instruction_comes_before_shots_and_a_prompt_before_both(examples: Path) -> None:
    """Promise: the order of the statements means nothing; the order in front is prompt, instruction, examples."""
    for program in (
        f'shots 1 from "{examples}"; instruct "w8"; prompt init text "w3 w2"',
        f'prompt init text "w3 w2"; instruct "w8"; shots 1 from "{examples}"',
    ):
        check(program, "w3 w2 w8 w5 w9 => w7", Reader())
    check(f'prompt init text "w3 w2"; instruct "w8" cached; shots 1 cached from "{examples}"',
          "w8 w5 w9 => w7 w3 w2", Reader())  # fmt: skip


def test_a_chat_template_is_used_where_there_is_one(examples: Path) -> None:
    """Promise: an instruction is the system's message, examples are turns; `plain` takes the text as it stands."""
    chat = Reader(CHAT)
    check('instruct "w8"', "<system> w8 <end>", chat)
    check('instruct "w8" plain', "w8", chat)
    turns = "<user> w5 w9 => <end> <assistant> w7 <end> <user> w15 => <end> <assistant> w17 w3 <end>"
    check(f'shots 2 from "{examples}"', turns, chat)
    check(f'instruct "w8"; shots 2 from "{examples}"', f"<system> w8 <end> {turns}", chat)


def test_what_an_example_says_is_no_place(tmp_path: Path) -> None:
    """Promise: `{output}` in an input stays as it is."""
    from surgery.operations.shots import written

    assert written("{input} => {output}", {"input": "{output}", "output": "{input}"}) == "{output} => {input}"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('{"input": "w1", "output": "w2"}\n{"input": "w1"}', "bad.jsonl:2: no `output`"),
        ('{"input": "w1", "output": "w2"}\n\n{"x": 1}', "bad.jsonl:3: no `input` and no `output`"),
        ('{"input": "w1", "output": "w2"}\n[1]', "bad.jsonl:2: no `input` and no `output`"),
        ('{"input": "w1", "output": "w2"}\n{"input"', "bad.jsonl:2: no JSON"),
        ('{"input": "w1", "output": {}}', "bad.jsonl:1: `output` is neither a text nor a number"),
        ('{"input": "w1", "output": "w2"}', "`shots 2`, but"),
        ("", "has 0 examples"),
        ("\udcff", "it is not UTF-8"),
        (None, "cannot read"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, lines: str | None, said: str) -> None:
    """Promise: the file and the line are named, the statement is underlined, and the model is as it was."""
    path = tmp_path / "bad.jsonl"
    if lines is not None:
        path.write_text(lines, errors="surrogateescape")
    model, x = reference_decoder(), zoo.tokens(VOCABULARY, 2, 6)
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(SurgeryError) as raised:
        surgery.apply(surgery.parse(f'shots 2 from "{path}"'), model, example_inputs=(x,), tokenizer=Reader())
    (found,) = raised.value.diagnostics
    assert found.code == "S113"
    assert said in found.message
    assert found.span is not None
    assert [name for name, _ in model.named_modules()] == before


@pytest.mark.parametrize(
    ("template", "said"), [("{output}", "no {input}"), ("{input}", "no {output}"), ("{output} {input}", "before")]
)
def test_templates_without_their_places(template: str, said: str) -> None:
    """Promise: a template without {input} is refused with the program, before there is a model."""
    with pytest.raises(SurgeryError, match="S017") as raised:
        surgery.parse(f'shots 2 from "examples.jsonl" template "{template}"')
    assert said in str(raised.value)


def test_a_template_that_refuses() -> None:
    """Promise: what a chat template refuses is told with its reason, and with the way out."""

    class Refusing(Reader):
        def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
            raise ValueError("no system role")

    model, x = reference_decoder(), zoo.tokens(VOCABULARY, 2, 6)
    with pytest.raises(SurgeryError, match="no system role") as raised:
        surgery.plan(surgery.parse('instruct "w8"'), model, example_inputs=(x,), tokenizer=Refusing(CHAT))
    assert "plain" in str(raised.value)


@torch.no_grad()
def test_loaded_without_file_and_tokenizer(tmp_path: Path, examples: Path) -> None:
    """Promise: a saved model has its tokens; the file may be gone."""
    model, x = zoo.tiny("llama"), zoo.tokens(VOCABULARY, 2, 6)
    surgery.apply(surgery.parse(f'shots 2 from "{examples}"'), model, tokenizer=Reader())
    wanted: Tensor = model(input_ids=x).logits
    surgery.save(model, tmp_path / "out")
    examples.unlink()
    loaded: Any = surgery.load(tmp_path / "out")
    assert torch.equal(loaded(input_ids=x).logits, wanted)


def test_what_is_kept_does_not_see_what_is_trained() -> None:
    """Promise: the plan says that cached keys and values do not follow an adapter."""
    model, x = reference_decoder(), zoo.tokens(VOCABULARY, 2, 6)
    program = surgery.parse('instruct "w8" cached; lora rank 2 on attn.q')
    plan = surgery.plan(program, model, example_inputs=(x,), tokenizer=Reader())
    assert any("cached" in warning and "lora" in warning for warning in plan.warnings)
