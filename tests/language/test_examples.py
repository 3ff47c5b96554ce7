"""The examples: the one the project is about, the specs, and every statement the language is meant for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from surgery.language import format_text, load_program, parse
from surgery.language.selector import Difference, Glob, Intersection, Layers, Role, Selector, Union
from surgery.language.source import Source
from surgery.language.syntax import read_tree
from surgery.operations import TABLE, lookup
from surgery.operations.base import Operation
from surgery.operations.options import Ratio, Variant, schema
from tests.language.test_laws import refused_with_spans

SPECS = sorted((Path(__file__).parents[2] / "specs").glob("*.surgery"))
EVERYTHING = Path(__file__).parent / "everything.surgery"
EXAMPLE = "quantize base nf4 double\nlora rank 8 on attn.q,v\nprefix 20 on all layers\nprune magnitude 50% on ffn\n"
TOKENS = re.compile(r'"(?:[^"\\\n]|\\.)*"|#[^\n]*|[A-Za-z_][\w.]*|[-\d][\w.:%]*|\S')


def test_the_example_means_what_it_says() -> None:
    quantize, lora, prefix, prune = (statement for statement in parse(EXAMPLE).statements)
    assert (quantize.operation.verb, quantize.selector) == ("quantize", Role("base"))
    assert (vars(quantize.operation)["format"], vars(quantize.operation)["double"]) == ("nf4", True)
    assert (vars(lora.operation)["rank"], vars(lora.operation)["alpha"]) == (8, 8.0)
    assert lora.selector == Union((Role("attn.q"), Role("attn.v")))
    assert (vars(prefix.operation)["positions"], prefix.selector) == (20, Role("layers"))
    assert (vars(prune.operation)["score"], vars(prune.operation)["amount"], prune.selector) == (
        "magnitude",
        0.5,
        Role("ffn"),
    )


@pytest.mark.parametrize(
    "text", [EXAMPLE.replace("\n", ";"), EXAMPLE.replace("\n", "\r\n"), EXAMPLE.replace(" ", "\t  ")]
)
def test_semicolons_line_ends_and_gaps_do_not_matter(text: str) -> None:
    assert parse(text) == parse(EXAMPLE)


def test_the_example_is_a_spec_and_the_tour_is_the_example_with_comments() -> None:
    specs = {path.name: path for path in SPECS}
    assert specs["qlora.surgery"].read_text() == EXAMPLE
    assert load_program(specs["tour.surgery"]) == parse(EXAMPLE)


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_specs_check_are_formatted_and_print_back(path: Path) -> None:
    program = load_program(path)
    assert program.statements
    assert parse(str(program)) == program
    assert format_text(path.read_text()) == path.read_text()


def found(verb: str) -> type[Operation]:
    operation = lookup(verb)
    assert operation is not None
    return operation


def test_specs_use_every_option_of_every_verb_of_ours() -> None:
    text = "\n".join(path.read_text() for path in SPECS)
    words = [
        word
        for verb in TABLE
        for option in schema(found(verb))
        for word in (option.choices if option.place == "kind" else (option.word,) if option.place != "quantity" else ())
    ]
    assert "dropout" in words
    assert "nf4" in words
    assert [word for word in words if not re.search(rf"\b{word}\b", text)] == []


def test_every_statement_of_the_language_parses_and_formats() -> None:
    """And means something: every verb but that one is in it."""
    text = EVERYTHING.read_text()
    tree, faults = read_tree(Source("everything", text))
    assert not faults
    assert len(tree.nodes) == 41
    assert read_tree(Source("formatted", format_text(text)))[0].nodes == tree.nodes
    program = parse(text.replace('include "base.surgery"', ""))
    assert len(program.statements) == 38
    assert {each.operation.verb for each in program.statements} == TABLE.keys() - {"freeze"}


@pytest.mark.parametrize("path", [*SPECS, EVERYTHING], ids=lambda path: path.stem)
def test_any_prefix_of_a_program_is_accepted_or_refused_with_a_span(path: Path) -> None:
    text = path.read_text()
    refused = sum(refused_with_spans(text[:stop]) for stop in range(len(text)))
    assert refused > 0 or "include" in text


@pytest.mark.parametrize("path", [*SPECS, EVERYTHING], ids=lambda path: path.stem)
def test_a_program_less_any_token_is_accepted_or_refused_with_a_span(path: Path) -> None:
    text = path.read_text()
    tokens = list(TOKENS.finditer(text))[:: 1 if len(text) < 1000 else 4]
    assert sum(refused_with_spans(text[: token.start()] + text[token.end() :]) for token in tokens) > 0


ON: list[tuple[str, Selector]] = [
    ("attn", Role("attn")),
    ("attn.q,v", Union((Role("attn.q"), Role("attn.v")))),
    ("attn.q , v", Union((Role("attn.q"), Role("attn.v")))),
    ("attn, ffn", Union((Role("attn"), Role("ffn")))),
    ("attn.q, ffn", Union((Role("attn.q"), Role("ffn")))),
    ("attn.q,v + ffn.up,down", Union((Role("attn.q"), Role("attn.v"), Role("ffn.up"), Role("ffn.down")))),
    ("ffn.up,gate,down", Union((Role("ffn.up"), Role("ffn.gate"), Role("ffn.down")))),
    ("mixer.out,in", Union((Role("mixer.out"), Role("mixer.in")))),
    ("all linear", Role("linear")),
    ("all layers", Role("layers")),
    ("layers 3", Layers(3, 3)),
    ("layers -2..-1", Layers(-2, -1)),
    ("layers 0, 3..5", Union((Layers(0, 0), Layers(3, 5)))),
    ("decoder layers 0, 2", Union((Layers(0, 0, stack="decoder"), Layers(2, 2, stack="decoder")))),
    ("encoder", Layers(stack="encoder")),
    ('"model.*.mlp"', Glob("model.*.mlp")),
    ("ffn in layers even", Intersection(Role("ffn"), Layers(parity="even"))),
    ("ffn except layers 3 in encoder", Difference(Intersection(Role("ffn"), Layers(stack="encoder")), Layers(3, 3))),
    ("(ffn except layers 3) in encoder", Intersection(Difference(Role("ffn"), Layers(3, 3)), Layers(stack="encoder"))),
    ("(attn + ffn) + norm", Union((Role("attn"), Role("ffn"), Role("norm")))),
]


@pytest.mark.parametrize(("text", "selector"), ON, ids=[text for text, _ in ON])
def test_selectors(text: str, selector: Selector) -> None:
    (statement,) = parse(f"lora rank 1 on {text}").statements
    assert statement.selector == selector


LEADING: list[tuple[str, str]] = [
    ("quantize base nf4", "quantize nf4 on base"),
    ("quantize nf4", "quantize nf4 on base"),
    ("quantize ffn fp4", "quantize fp4 on ffn"),
    ("quantize attn.q,v + ffn nf4", "quantize nf4 on attn.q,v + ffn"),
    ("quantize all linear nf4", "quantize nf4 on all linear"),
    ("quantize layers 0..3 nf4", "quantize nf4 on layers 0..3"),
    ("quantize decoder layers 0..3 nf4", "quantize nf4 on decoder layers 0..3"),
    ('quantize "model.*" nf4', 'quantize nf4 on "model.*"'),
    ("quantize (ffn except layers 3) nf4", "quantize nf4 on ffn except layers 3"),
    ("quantize ffn nf4 in layers 2", "quantize nf4 on ffn in layers 2"),
]


@pytest.mark.parametrize(("leading", "plain"), LEADING, ids=[leading for leading, _ in LEADING])
def test_a_selector_may_lead_where_a_verb_takes_it(leading: str, plain: str) -> None:
    assert parse(leading) == parse(plain)


@pytest.mark.usefixtures("toys")
def test_every_way_to_write_an_option() -> None:
    text = (
        'toy fancy 2:4 width 7 steps 20 steps rate 2e-4 drop 5% dtype bf16 label x title "a\\nb" after attn, ffn '
        "via mlp global on ffn.up as one expect 3"
    )
    (statement,) = parse(text).statements
    fields = vars(statement.operation)
    assert fields["mode"] == "fancy"
    assert fields["amount"] == Ratio(2, 4)
    assert (fields["width"], fields["steps"], fields["rate"], fields["drop"]) == (7, 20, 2e-4, 0.05)
    assert (fields["dtype"], fields["label"], fields["title"]) == ("bf16", "x", "a\nb")
    assert fields["after"] == Union((Role("attn"), Role("ffn")))
    assert fields["via"] == Variant("mlp", 512)
    assert (fields["global_"], fields["gated"]) == (True, False)
    assert (statement.name, statement.expect) == ("one", 3)
    assert statement.places["width"].text == "width 7"


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize(
    ("written", "field", "value"),
    [
        ("toy 20 on ffn", "amount", 20),
        ("toy 50% on ffn", "amount", 0.5),
        ("toy via mlp 64 on ffn", "via", Variant("mlp", 64)),
        ('toy via text "T" on ffn', "via", Variant("text", "T")),
        ("toy via lstm on ffn", "via", Variant("lstm")),
        ("toy via mlp gated on ffn", "via", Variant("mlp", 512)),
        ("toy width 9 on ffn", "rate", 9.0),
        ("tune lr 2e-4", "lr", 2e-4),
    ],
)
def test_values(written: str, field: str, value: object) -> None:
    (statement,) = parse(written).statements
    assert vars(statement.operation)[field] == value


@pytest.mark.usefixtures("toys")
def test_paths_start_from_the_programs_directory(tmp_path: Path) -> None:
    (tmp_path / "a.surgery").write_text('toy using "data/x.jsonl" on ffn')
    (statement,) = load_program(tmp_path / "a.surgery").statements
    assert vars(statement.operation)["using"] == tmp_path / "data" / "x.jsonl"
    assert parse(str(statement)).statements == (statement,)


def test_the_seed_is_part_of_the_program() -> None:
    assert parse("seed 7").seed == 7
    assert parse("seed 7") != parse("seed 8")
    assert parse(str(parse("seed 7 ; lora rank 1 on attn"))) == parse("lora rank 1 on attn ; seed 7")
