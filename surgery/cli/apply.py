"""`surgery apply`: change a model as a program says and save it."""

from __future__ import annotations

from pathlib import Path

import click

from surgery.cli.arguments import (
    base_option,
    force_option,
    jobs_option,
    model_argument,
    output_option,
    program_argument,
    read_program,
    set_option,
    standalone_option,
    tokenizer_for,
)
from surgery.cli.progress import progress
from surgery.cli.sizes import saved


@click.command()
@program_argument
@model_argument
@output_option
@set_option
@force_option
@standalone_option
@base_option
@jobs_option
def command(
    program: str,
    model: str,
    output: Path,
    settings: dict[str, str],
    force: bool,
    standalone: bool,
    base: str | None,
    jobs: int,
) -> None:
    """Apply PROGRAM to MODEL and save the result in a new directory.

    MODEL may be the output of an earlier `surgery apply`: both programs count as one then. The directory appears whole
    or not at all. `surgery.load` gives the model back, `surgery verify` checks it. A base in a directory whose tensors
    the program leaves alone is not copied: the result refers to it, by path and by the digest of every tensor.
    """
    parsed = read_program(program, settings)
    from surgery.checkpoint.staging import check_target

    check_target(output, force)
    from surgery.checkpoint.load import load_either
    from surgery.checkpoint.models import is_directory

    with progress(f"reading {model}"):
        loaded = load_either(model, meta=is_directory(model), base=base)
        from surgery.checkpoint.save import bytes_of, save
        from surgery.checkpoint.streaming import stream, whole_because
        from surgery.compiler import apply, plan
    tokenizer = tokenizer_for(parsed, loaded)
    with progress(f"studying {model}"):
        made = plan(parsed, loaded.model, example_inputs=loaded.example_inputs, tokenizer=tokenizer)
    if loaded.directory is not None and whole_because(made, loaded) is None:
        with progress(f"writing {output}", lambda: made.cost.bytes_after) as tell:
            stream(
                made,
                loaded.directory,
                output,
                origin=loaded.origin,
                tokenizer=tokenizer,
                force=force,
                standalone=standalone,
                jobs=jobs,
                tell=tell,
            )
    else:
        if is_directory(model):
            with progress(f"reading {model}"):
                loaded = load_either(model)
        with progress("applying", lambda: made.places) as tell:
            apply(made, loaded.model, tokenizer=tokenizer, tell=tell)
        with progress(f"writing {output}", lambda: bytes_of(loaded.model)) as tell:
            save(loaded.model, output, force=force, origin=loaded.origin, standalone=standalone, tell=tell)
        made = loaded.model.__dict__["_surgery"].plan
    click.echo(str(made))
    click.echo(f"\n{saved(output)}")
