"""`surgery anatomy`: a model's stacks, layers and roles, from shapes alone."""

from __future__ import annotations

import json

import click

from surgery.cli.arguments import model_argument
from surgery.cli.progress import progress


@click.command()
@model_argument
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def command(model: str, as_json: bool) -> None:
    """Show which part of MODEL is what: stacks and layers, and each role with its module, shape and channels.

    Reads shapes, not weights. The roles are those that programs select: `lora rank 8 on attn.q,v`.
    """
    from surgery.checkpoint import models

    with progress(f"studying {model}"):
        loaded = models.load_meta(model)
        from surgery.anatomy import study

        anatomy = study(loaded.model, loaded.example_inputs)
    if as_json:
        stacks = [{"name": s.name, "path": s.path, "depth": s.depth} for s in anatomy.stacks]
        parts = [part.to_json() for part in anatomy.parts]
        click.echo(json.dumps({"model": anatomy.model, "stacks": stacks, "parts": parts}, indent=1))
    else:
        click.echo(str(anatomy))
