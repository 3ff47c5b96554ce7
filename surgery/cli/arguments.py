"""PROGRAM, MODEL and `--set` as every command takes them, with completion."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from surgery.checkpoint.models import LoadedModel
    from surgery.language.program import Program

Command = TypeVar("Command", bound=Callable[..., Any])


def _programs(ctx: click.Context, parameter: click.Parameter, start: str) -> list[CompletionItem]:
    return _paths(start, lambda path: path.suffix == ".surgery")


def _models(ctx: click.Context, parameter: click.Parameter, start: str) -> list[CompletionItem]:
    demo = [CompletionItem("demo")] if "demo".startswith(start) else []
    return demo + _paths(start, lambda path: path.suffix == ".py" or (path / "config.json").is_file())


def _outputs(ctx: click.Context, parameter: click.Parameter, start: str) -> list[CompletionItem]:
    return _paths(start, lambda path: (path / "surgery.json").is_file())


def _directories(ctx: click.Context, parameter: click.Parameter, start: str) -> list[CompletionItem]:
    demo = [CompletionItem("demo")] if "demo".startswith(start) else []
    files = ("config.json", "surgery.json", "model.safetensors")
    return demo + _paths(start, lambda path: any((path / name).is_file() for name in files))


def _settings(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """`name=value`, split; of two for one name the last holds."""
    split = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals or not name.strip().isidentifier():
            raise click.BadParameter(f"'{value}' is not NAME=VALUE, as in --set r=16", ctx, parameter)
        split[name.strip()] = text.strip()
    return split


program_argument = click.argument("program", metavar="PROGRAM", shell_complete=_programs)
model_argument = click.argument("model", metavar="MODEL", shell_complete=_models)
directory_argument = click.argument("out", metavar="DIR", shell_complete=_directories)
before_argument = click.argument("before", metavar="A", type=click.Path(path_type=Path), shell_complete=_directories)
after_argument = click.argument("after", metavar="B", type=click.Path(path_type=Path), shell_complete=_directories)
out_argument = click.argument("out", metavar="OUT", shell_complete=_outputs)
set_option = click.option(
    "--set",
    "settings",
    multiple=True,
    callback=_settings,
    metavar="NAME=VALUE",
    help="Give a `let` parameter another value.",
)
base_option = click.option(
    "--base",
    metavar="MODEL",
    shell_complete=_directories,
    help="Where the base lies that OUT refers to, when it is not where it was.",
)
standalone_option = click.option(
    "--standalone", is_flag=True, help="Copy the base though it is untouched; otherwise it is referred to."
)
force_option = click.option("-f", "--force", is_flag=True, help="Replace a model that lies there.")

jobs_option = click.option(
    "--jobs", type=click.IntRange(1), default=1, metavar="N", help="Processes that share a directory's tensors."
)


def output_option(command: Command) -> Command:
    """`-o DIR`, required."""
    kind = click.Path(path_type=Path)
    return click.option("-o", "--output", required=True, type=kind, metavar="DIR", help="New directory.")(command)


def read_program(program: str, settings: Mapping[str, str]) -> Program:
    """The program of a file, or of standard input for `-`. Raises ProgramError with everything that is wrong."""
    from surgery.language import load_program, parse

    if program == "-":
        text = sys.stdin.buffer.read().decode("utf-8", "replace")
        return parse(text, name="<stdin>", parameters=settings, directory=Path.cwd())
    return load_program(program, **settings)


def tokenizer_for(program: Program, loaded: LoadedModel) -> Any | None:
    """The model's tokenizer where programs have texts, this one or one that the model has been through.

    Reading it takes time that others need not spend.
    """
    record = loaded.model.__dict__.get("_surgery")
    statements = (*program.statements, *(() if record is None else record.plan.program.statements))
    return loaded.tokenizer if any(statement.operation.needs_text for statement in statements) else None


def _paths(start: str, wanted: Callable[[Path], bool]) -> list[CompletionItem]:
    """Wanted paths, and directories on the way to them. A lone directory is entered: shells put a space after it."""
    folder, slash, name = start.rpartition("/")
    try:
        found = sorted(Path(folder + slash or ".").expanduser().iterdir())
    except OSError:
        return []
    visible = [path for path in found if path.name.startswith(name) and (name or not path.name.startswith("."))]
    items = [f"{folder}{slash}{path.name}" for path in visible if wanted(path)]
    inner = [f"{folder}{slash}{path.name}/" for path in visible if path.is_dir() and not wanted(path)]
    if not items and len(inner) == 1:
        return _paths(inner[0], wanted) or [CompletionItem(inner[0])]
    return [CompletionItem(item) for item in items + inner]
