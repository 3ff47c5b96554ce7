"""Text to program: reads the tree, follows includes, collects parameters, binds every statement; reports all faults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from surgery.errors import Diagnostic, ProgramError
from surgery.language.bind import Context, bind
from surgery.language.faults import RESERVED, too_large, too_many
from surgery.language.program import Program, Statement
from surgery.language.source import Source, Span
from surgery.language.suggest import did_you_mean, listed
from surgery.language.syntax import LARGEST, MOST_FAULTS, read_tree
from surgery.language.texts import decode, encode
from surgery.language.tree import Act, Directive, Include, Let, Literal, Tree, Word
from surgery.operations import Vocabulary

VERSION = 1
DEEPEST_INCLUDE = 64
SEED = "expected a whole number from 0, of at most 18 digits"
NO_PARAMETERS: Mapping[str, object] = {}


def parse(
    text: str,
    *,
    name: str = "<text>",
    parameters: Mapping[str, object] = NO_PARAMETERS,
    directory: Path | None = None,
) -> Program:
    """The program a text means.

    name: what errors call the text. parameters: values for its `let` names, as numbers or as written, `"5%"`.
    directory: where its relative paths start. Raises ProgramError with every fault of the text and of what it includes.
    """
    if not isinstance(text, str):
        raise ProgramError.of("S100", f"not a program: {type(text).__name__}", help="what is parsed is a text")
    source = Source(name, text)
    collector = _Collector()
    collector.text(source, directory, ())
    return collector.program(source, parameters)


def load_program(path: str | Path, /, **parameters: object) -> Program:
    """The program in a file; paths in it start from the file's directory. Raises ProgramError."""
    path = Path(path)
    source = _read(path, None)
    collector = _Collector()
    collector.seen.add(path.resolve())
    collector.text(source, path.parent, (path.resolve(),))
    return collector.program(source, parameters)


def _read(path: Path, span: Span | None) -> Source:
    try:
        if path.stat().st_size > LARGEST:
            raise ProgramError(too_large(span or Span(Source(str(path), ""), 0, 0)))
        return Source(str(path), path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError) as error:  # ValueError: a path with a null character, or no UTF-8
        reason = (
            "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else getattr(error, "strerror", str(error))
        )
        raise ProgramError.of("S034", f"cannot read {path}: {reason}", span) from error


@dataclass(frozen=True)
class _Pending:
    """A statement to bind, with the directory of its file."""

    act: Act
    directory: Path | None


class _Collector:
    """What a text and everything it includes say; each file is read once."""

    def __init__(self) -> None:
        self.acts: list[_Pending] = []
        self.values: dict[str, Word | Literal] = {}
        self.seeds: list[Literal] = []
        self.faults: list[Diagnostic] = []
        self.seen: set[Path] = set()

    def text(self, source: Source, directory: Path | None, chain: tuple[Path, ...]) -> None:
        tree, faults = read_tree(source)
        self.faults += faults
        self.parameters(tree)
        for node in tree.nodes:
            if isinstance(node, Act):
                self.acts.append(_Pending(node, directory))
            elif isinstance(node, Directive):
                self.directive(node)
            elif isinstance(node, Include):
                try:
                    self.include(node, directory, chain)
                except ProgramError as error:
                    self.faults += error.diagnostics

    def parameters(self, tree: Tree) -> None:
        """An including text is collected before what it includes, so that its values win."""
        own: dict[str, Word | Literal] = {}
        for let in (node for node in tree.nodes if isinstance(node, Let)):
            name = let.name.text
            if name in own:
                self.faults.append(Diagnostic("S031", f"'{name}' has a value already", let.name.span, "second value"))
            elif name in RESERVED or "." in name:
                self.faults.append(
                    Diagnostic("S033", f"'{name}' cannot be a parameter", let.name.span, "choose another name")
                )
                continue
            elif isinstance(let.value, Literal) and let.value.form == "text":
                try:
                    decode(let.value)
                except ProgramError as error:
                    self.faults += error.diagnostics
            own.setdefault(name, let.value)
        self.values = {**own, **self.values}

    def directive(self, node: Directive) -> None:
        number = node.number
        if node.keyword == "surgery" and number.text != str(VERSION):
            self.faults.append(
                Diagnostic(
                    "S008",
                    f"version {number.text} of the language is not known here",
                    number.span,
                    f"this is version {VERSION}",
                    "upgrade model-surgery, or remove the statement",
                )
            )
        if node.keyword == "seed":
            if not number.text.isdecimal() or len(number.text) > 18:
                self.faults.append(Diagnostic("S012", f"the seed cannot be {number.text[:40]}", number.span, SEED))
            elif self.seeds and len(self.seeds[0].text) and self.seeds[0].span.source == number.span.source:
                self.faults.append(Diagnostic("S016", "the seed is said twice", number.span, "remove one of them"))
            else:
                self.seeds.append(number)

    def include(self, node: Include, directory: Path | None, chain: tuple[Path, ...]) -> None:
        name = decode(node.path)
        path = (directory or Path()) / name
        try:
            real = path.resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise ProgramError.of("S034", f"cannot read {name!r}: {error}", node.path.span) from error
        if real in chain:
            steps = [*chain[chain.index(real) :], real]
            shown = " -> ".join(step.name for step in steps)
            raise ProgramError.of("S035", f"the include never ends: {shown}", node.path.span, "includes itself")
        if len(chain) >= DEEPEST_INCLUDE:
            raise ProgramError.of("S035", f"includes are nested deeper than {DEEPEST_INCLUDE}", node.path.span)
        if real in self.seen:
            return
        self.seen.add(real)
        self.text(_read(path, node.path.span), path.parent, (*chain, real))

    def program(self, source: Source, parameters: Mapping[str, object]) -> Program:
        values = {**self.values, **self.given(parameters)}
        vocabulary = Vocabulary()
        statements: list[Statement] = []
        for pending in self.acts:
            if len(self.faults) > MOST_FAULTS:
                break
            try:
                statements.append(bind(pending.act, Context(vocabulary, values, pending.directory)))
            except ProgramError as error:
                self.faults += error.diagnostics
        if self.faults:
            raise ProgramError(*_in_order(self.faults, source))
        return Program(tuple(statements), source, int(self.seeds[0].text) if self.seeds else 0)

    def given(self, parameters: Mapping[str, object]) -> dict[str, Word | Literal]:
        """Values from outside, `--set r=16`, as if written in the text."""
        given: dict[str, Word | Literal] = {}
        for name, value in parameters.items():
            source = Source("--set", f"{name}={value}")
            if name not in self.values:
                known = f"parameters are {listed(sorted(self.values), 'and')}" if self.values else ""
                self.faults.append(
                    Diagnostic(
                        "S032",
                        f"the program has no parameter '{name}'",
                        Span(source, 0, len(name)),
                        did_you_mean(name, self.values),
                        known or f"declare it in the program: `let {name} = {value}`",
                    )
                )
                continue
            given[name] = _written(value, source, len(name) + 1)
        return given


def _written(value: object, source: Source, start: int) -> Word | Literal:
    """A value as the tree holds it; what is no number and no word is a text."""
    text = str(value)
    span = Span(source, start, len(source.text))
    prefix = "let it = "
    tree, faults = read_tree(Source("--set", prefix + text))
    lets = [node for node in tree.nodes if isinstance(node, Let)]
    if not faults and len(tree.nodes) == len(lets) == len(tree.lines) == 1 and tree.lines[0].comment is None:
        read = lets[0].value
        return Word(read.text, span) if isinstance(read, Word) else Literal(read.form, read.text, span)
    return Literal("text", encode(text), span)


def _in_order(faults: list[Diagnostic], source: Source) -> list[Diagnostic]:
    """By place in the main text; faults of included texts and of parameters after it. A fault is told once."""
    told = list(dict.fromkeys(faults))
    here = sorted(
        (fault for fault in told if fault.span is not None and fault.span.source == source),
        key=lambda fault: fault.span.start if fault.span else 0,
    )
    elsewhere = [fault for fault in told if fault.span is None or fault.span.source != source]
    ordered = here + elsewhere
    return ordered if len(ordered) < MOST_FAULTS else [*ordered[:MOST_FAULTS], too_many(MOST_FAULTS)]
