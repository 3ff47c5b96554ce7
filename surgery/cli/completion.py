"""`surgery completion`: the script that teaches a shell our commands, files and models."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS), metavar="SHELL")
def command(shell: str) -> None:
    """Print the completion script for SHELL: bash, zsh or fish.

    In ~/.bashrc: eval "$(surgery completion bash)"
    """
    from surgery.cli import cli

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(cli, {}, "surgery", "_SURGERY_COMPLETE").source())
