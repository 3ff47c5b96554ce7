"""`surgery report`: a saved result on one HTML page, with plots."""

from __future__ import annotations

from pathlib import Path

import click

from surgery.cli.arguments import base_option, out_argument
from surgery.cli.progress import progress


@click.command()
@out_argument
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="FILE.html", help="Where to; unsaid, OUT.html beside it."
)
@click.option("-f", "--force", is_flag=True, help="Replace a file that lies there.")
@base_option
def command(out: str, output: Path | None, force: bool, base: str | None) -> None:
    """Write what was done to OUT on one HTML page: zeros by layer and role, magnitudes, cuts, sizes, promises.

    Reads every weight once, a place at a time, and the base's where it is still there. The page needs no other file.
    """
    directory = Path(out).expanduser()
    target = Path(f"{directory.resolve()}.html") if output is None else output
    from surgery.checkpoint.manifest import Manifest
    from surgery.checkpoint.staging import check_target
    from surgery.cli.page import page

    if not (force and target.is_file()):
        check_target(target)
    Manifest.read(directory)
    with progress(f"reading {out}"):
        from surgery.checkpoint.report import facts

        text = page(directory.resolve().name, facts(directory, base))
    aside = target.with_name(f".{target.name}.partial")
    aside.write_text(text, "utf-8")
    aside.replace(target)
    click.echo(f"Written to {target} ({len(text.encode()):,} bytes).")
