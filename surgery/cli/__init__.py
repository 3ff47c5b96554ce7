"""The command line: one file per command, imported when it is used, and one place where errors are shown."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING

import click

from surgery.cli import errors

if TYPE_CHECKING:
    from collections.abc import Sequence

# name: (module, one-line help). Help is kept here so that `surgery --help` imports no command.
COMMANDS: dict[str, tuple[str, str]] = {
    "check": ("surgery.cli.check", "Check programs, without a model."),
    "fmt": ("surgery.cli.fmt", "Format programs."),
    "explain": ("surgery.cli.explain", "Tell the long story of an error code."),
    "reference": ("surgery.cli.reference", "Show the verbs and their options."),
    "anatomy": ("surgery.cli.anatomy", "Show a model's stacks, layers and roles."),
    "plan": ("surgery.cli.plan", "Show what a program would change in a model."),
    "show": ("surgery.cli.show", "Show a site's generated code, before and after."),
    "apply": ("surgery.cli.apply", "Apply a program to a model and save the result."),
    "verify": ("surgery.cli.verify", "Check the promises of a saved result."),
    "merge": ("surgery.cli.merge", "Fold a saved result into plain weights."),
    "export": ("surgery.cli.export", "Write a saved result in a form that others load."),
    "import": ("surgery.cli.import_", "Put an adapter of another library on its base."),
    "extract": ("surgery.cli.extract", "Make an adapter of what tuning has done to a model."),
    "inspect": ("surgery.cli.inspect", "Tell what a directory is, without reading its weights."),
    "report": ("surgery.cli.report", "Write what was done on one HTML page, with plots."),
    "diff": ("surgery.cli.diff", "Compare the tensors of two directories."),
    "completion": ("surgery.cli.completion", "Print the shell completion script."),
}


class Escaped(BaseException):
    """Carries what click would turn into an exit status of its own past it."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


class Commands(click.Group):
    """Subcommands by name from the table."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[cmd_name][0]).command
        command.name = cmd_name
        return command

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, OSError) as error:
            raise Escaped(error) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help) for name, (_, help) in COMMANDS.items()])


def _version(ctx: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from surgery import __version__

        click.echo(f"surgery {__version__}")
        ctx.exit()


@click.group(
    cls=Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.pass_context
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Show the version.")
def cli(ctx: click.Context) -> None:
    """Say what to change in a pretrained neural network, and have it done and checked.

    PROGRAM is a .surgery file, or `-` for standard input. MODEL is a Hugging Face directory, `demo`,
    FILE.py:FUNCTION or module:function. Exit status: 0 done, 1 a promise failed or what is compared differs,
    2 bad input.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def _terminate(number: int, frame: object) -> None:
    raise errors.Terminated


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit; the console script."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # MODEL is always local
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Before transformers is imported; libraries' warnings are for their callers, our user sees results and diagnostics.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.warnoptions:
        import warnings

        warnings.simplefilter("ignore")
    before = signal.signal(signal.SIGTERM, _terminate)
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        status = cli.main(args=arguments, prog_name="surgery", standalone_mode=False)
        sys.stdout.flush()
    except Escaped as escaped:
        status = errors.show(escaped.error)
    except BaseException as error:
        status = errors.show(error)
    finally:
        logging.disable(level)
        signal.signal(signal.SIGTERM, before)
    sys.exit(status if isinstance(status, int) else 0)
