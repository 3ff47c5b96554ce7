"""`surgery export`: a saved result in a form that others load, or with its base."""

from __future__ import annotations

from pathlib import Path

import click

from surgery.checkpoint.forms import FORMS
from surgery.cli.arguments import base_option, force_option, out_argument, output_option
from surgery.cli.progress import progress
from surgery.cli.sizes import directory_size


@click.command()
@out_argument
@click.option("--to", "form", required=True, type=click.Choice(FORMS), help="Who is to load it, or in what form.")
@output_option
@force_option
@base_option
def command(out: str, form: str, output: Path, force: bool, base: str | None) -> None:
    """Write the result in OUT for others: adapters for PEFT, a folded model for transformers, a program for torch.

    `--to standalone` writes OUT itself with a copy of the base that it refers to, each tensor held to its digest and
    none loaded: as `surgery apply --standalone` would have, and as it has been trained since. An OUT that has all of
    its tensors already is copied. Other files in OUT come along, hidden ones aside.
    """
    from surgery.checkpoint.staging import check_target

    check_target(output, force)
    from surgery.checkpoint.base import total_bytes
    from surgery.checkpoint.export import export
    from surgery.checkpoint.load import read
    from surgery.checkpoint.manifest import Manifest

    manifest = Manifest.read(Path(out))
    if form == "standalone":
        from surgery.checkpoint.standalone import stream_standalone

        with progress(f"writing {output}", lambda: total_bytes(Path(out), base)) as tell:
            stream_standalone(Path(out), output, force=force, base=base, tell=tell)
        click.echo(f"Saved in {output} ({directory_size(output)}).")
        return
    with progress(f"reading {out}", lambda: total_bytes(Path(out), base)) as tell:
        loaded = read(Path(out), base=base, tell=tell)
    with progress(f"writing {output}"):
        export(
            loaded.model,
            output,
            to=form,
            origin=manifest.origin,
            source=Path(out),
            force=force,
            example_inputs=loaded.example_inputs,
        )
    click.echo(f"Saved in {output} ({directory_size(output)}).")
