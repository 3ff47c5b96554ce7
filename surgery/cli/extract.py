"""`surgery extract`: what fine-tuning has done to a model, as a low-rank adapter on its base."""

from __future__ import annotations

from pathlib import Path

import click

from surgery.cli.arguments import force_option, jobs_option, output_option, standalone_option
from surgery.cli.progress import progress
from surgery.cli.sizes import saved


def _selector(ctx: click.Context, parameter: click.Parameter, words: tuple[str, ...]) -> str:
    """`on SELECTOR` as it is written in a program, in one word of the shell or in several."""
    text = " ".join(words).strip()
    options = [word for word in words if word.startswith("--") or (word.startswith("-") and word[1:2].isalpha())]
    if options:
        raise click.NoSuchOption(options[0], ctx=ctx)
    if text and not text.startswith("on "):
        raise click.BadParameter(f"'{text}': write `on SELECTOR`, as in on attn.q,v", ctx, parameter)
    return text.removeprefix("on ") or "all linear"


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("tuned", metavar="TUNED")
@click.argument("on", metavar="[on SELECTOR]", nargs=-1, callback=_selector)
@click.option("--base", required=True, metavar="MODEL", help="The model that TUNED was tuned from.")
@click.option("--rank", required=True, type=click.IntRange(1), metavar="N", help="Rank of every adapter.")
@output_option
@force_option
@standalone_option
@jobs_option
def command(tuned: str, on: str, base: str, rank: int, output: Path, force: bool, standalone: bool, jobs: int) -> None:
    """Save the low-rank adapter nearest to the difference of TUNED and its base, on the base.

    By default of all linear maps but the head. For each matrix: how large the difference is beside the weight, and how
    much of it the adapter loses. What else differs is named, and is the base's in the result. DIR is as of `surgery
    apply`: it loads, merges and exports.
    """
    from surgery.checkpoint.staging import check_target

    check_target(output, force)
    from surgery.checkpoint import models
    from surgery.checkpoint.extracting import stream_extract, whole_of_either
    from surgery.checkpoint.save import bytes_of, save
    from surgery.compiler import plan
    from surgery.compiler.extract import check_alike, extract, statement, tensors

    program = statement(rank, on)
    with progress(f"studying {base}"):
        shapes, theirs = models.load_meta(base), models.load_meta(tuned)
        check_alike(tensors(shapes.model), tensors(theirs.model))
        made = plan(program, shapes.model, example_inputs=shapes.example_inputs)
    first, second = shapes.directory, theirs.directory
    if first is not None and second is not None and whole_of_either(made, shapes, theirs) is None:
        with progress(f"writing {output}", lambda: made.cost.bytes_after) as tell:
            found = stream_extract(
                made,
                first,
                second,
                output,
                origin=shapes.origin,
                force=force,
                standalone=standalone,
                jobs=jobs,
                tell=tell,
            )
    else:
        with progress(f"reading {base} and {tuned}"):
            loaded, other = models.load(base), models.load(tuned)
            found = extract(other.model, loaded.model, rank=rank, on=on, example_inputs=loaded.example_inputs)
        with progress(f"writing {output}", lambda: bytes_of(loaded.model)) as tell:
            save(loaded.model, output, force=force, origin=loaded.origin, standalone=standalone, tell=tell)
    click.echo(str(found))
    click.echo(saved(output))
