"""`surgery verify`: check every promise on a saved result."""

from __future__ import annotations

import json
from pathlib import Path

import click

from surgery.cli.arguments import base_option, out_argument
from surgery.cli.errors import FAILED
from surgery.cli.progress import progress


@click.command()
@out_argument
@base_option
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_context
def command(ctx: click.Context, out: str, base: str | None, as_json: bool) -> None:
    """Check what the program promises on the model in OUT, each error against its bound.

    Exit status 1 when a promise does not hold. What was found is kept in OUT/surgery.json.
    """
    from surgery.checkpoint.base import total_bytes
    from surgery.checkpoint.load import read
    from surgery.checkpoint.manifest import keep_promises

    with progress(f"reading {out}", lambda: total_bytes(Path(out), base)) as tell:
        loaded = read(Path(out), base=base, tell=tell)
    with progress("verifying"):
        from surgery.verify import verify

        report = verify(loaded.model, example_inputs=loaded.example_inputs, tokenizer=loaded.tokenizer)
    keep_promises(Path(out), report.to_json())
    click.echo(json.dumps(report.to_json(), indent=1) if as_json else str(report))
    ctx.exit(0 if report else FAILED)
