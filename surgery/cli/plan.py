"""`surgery plan`: what a program would change in a model, from shapes alone."""

from __future__ import annotations

import json

import click

from surgery.cli.arguments import model_argument, program_argument, read_program, set_option, tokenizer_for
from surgery.cli.heat import in_blocks, strips
from surgery.cli.progress import progress


@click.command()
@program_argument
@model_argument
@set_option
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def command(program: str, model: str, settings: dict[str, str], as_json: bool) -> None:
    """Show what PROGRAM would change in MODEL: sites, parameters, memory, what merges, what becomes zero.

    Reads shapes, not weights: a 70-billion-parameter config.json is enough.
    """
    from surgery.checkpoint.load import load_either

    parsed = read_program(program, settings)
    with progress(f"studying {model}"):
        loaded = load_either(model, meta=True)
        from surgery.compiler import plan

        made = plan(parsed, loaded.model, example_inputs=loaded.example_inputs, tokenizer=tokenizer_for(parsed, loaded))
        from surgery.compiler.zeros import planned
    if as_json:
        click.echo(json.dumps(made.to_json(), indent=1))
        return
    click.echo("\n".join([str(made), *strips(planned(made), in_blocks())]))
