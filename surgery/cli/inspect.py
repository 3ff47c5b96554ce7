"""`surgery inspect`: what a directory is, from its manifest and the headers of its files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from surgery.cli.arguments import base_option, directory_argument
from surgery.cli.heat import in_blocks, strips
from surgery.cli.sizes import readable


@click.command()
@directory_argument
@base_option
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def command(out: str, base: str | None, as_json: bool) -> None:
    """Tell what the directory DIR is: program, places, sizes, sparsity, promises, and what made it.

    Reads headers and masks, no weights. An ordinary model directory is told about as well.
    """
    from surgery.checkpoint.inspect import inspect
    from surgery.checkpoint.models import directory_of

    found = inspect(directory_of(out), base)
    click.echo(json.dumps(found, indent=1) if as_json else "\n".join(lines(Path(out), found)))


def lines(out: Path, found: Mapping[str, Any]) -> Iterator[str]:
    """What was found, for people."""
    from surgery.compiler.zeros import Cell

    made = f", by surgery {found['version']}" if "version" in found else ""
    yield f"{out}: {found['model']}{made}"
    if found.get("origin"):
        yield f"  made from {found['origin']}"
    for file in found["files"]:
        kinds = ", ".join(f"{count:,} {dtype}" for dtype, count in file["elements"].items())
        yield f"  {file['name']}  {readable(file['bytes'])}  {file['tensors']} tensors  {kinds}"
    if base := found.get("base"):
        yield f"  base in {base['path']}, referred to: {base['tensors']} tensors, digest {base['digest'][:8]}"
        if "missing" in base:
            yield f"      MISSING: {base['missing']}"
    if found.get("quantization"):
        yield f"  quantized: {found['quantization']}"
    if "program" in found:
        yield ""
        for step in found["steps"]:
            zeros = f", {step['zeros']:.2%} zeros" if "zeros" in step else ""
            added = f", +{step['parameters']:,} parameters" if step["parameters"] else ""
            yield f"  {step['statement']}"
            yield f"      {step['places']} place{'' if step['places'] == 1 else 's'}{added}{zeros}"
        yield from strips([Cell(**cell) for step in found["steps"] for cell in step.get("by_layer", ())], in_blocks())
        promises = found["promises"]
        yield ""
        if promises is None:
            yield "  promises: not verified yet (`surgery verify` does)"
        else:
            broken = ", ".join(promises["broken"])
            yield f"  promises: {f'BROKEN: {broken}' if broken else 'all kept'} ({', '.join(promises['names'])})"
            if promises["unchecked"]:
                yield f"  not checked: {', '.join(promises['unchecked'])}"
