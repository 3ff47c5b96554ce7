"""`surgery import`: an adapter of another library, on its base, as a result of ours."""

from __future__ import annotations

from pathlib import Path

import click

from surgery.cli.arguments import force_option, output_option, standalone_option
from surgery.cli.progress import progress
from surgery.cli.sizes import saved


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--from", "form", required=True, type=click.Choice(("peft",)), help="Who wrote it.")
@click.option("--base", required=True, metavar="MODEL", help="The model it is for.")
@click.option("--as", "name", metavar="NAME", help="What to call the adapter.")
@output_option
@force_option
@standalone_option
def command(
    directory: Path, form: str, base: str, name: str | None, output: Path, force: bool, standalone: bool
) -> None:
    """Put the adapter in DIR on its base, and save both as `surgery apply` would."""
    from surgery.checkpoint.staging import check_target

    check_target(output, force)
    from surgery.checkpoint import models
    from surgery.checkpoint.interchange.peft_import import import_peft
    from surgery.checkpoint.save import save

    with progress(f"reading {base}"):
        loaded = models.load(base)
        model = import_peft(directory, loaded.model, name=name)
    with progress(f"writing {output}"):
        save(model, output, force=force, origin=loaded.origin, standalone=standalone)
    click.echo(saved(output))
