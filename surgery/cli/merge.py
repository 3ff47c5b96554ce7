"""`surgery merge`: fold what was added into plain weights."""

from __future__ import annotations

from pathlib import Path

import click

from surgery.cli.arguments import force_option, jobs_option, out_argument, output_option
from surgery.cli.progress import progress
from surgery.cli.sizes import directory_size


@click.command()
@out_argument
@output_option
@force_option
@jobs_option
def command(out: str, output: Path, force: bool, jobs: int) -> None:
    """Fold the model in OUT into plain weights, in a new directory that `from_pretrained` loads.

    What cannot be folded stays beside the weights, and is named.
    """
    from surgery.checkpoint.staging import check_target

    check_target(output, force)
    from surgery.checkpoint.load import load
    from surgery.checkpoint.manifest import Manifest, total_bytes
    from surgery.checkpoint.merging import merged_shapes, stream_merge
    from surgery.checkpoint.save import bytes_of, save_merged
    from surgery.compiler import merge, record_of

    manifest = Manifest.read(Path(out))
    shapes = merged_shapes(Path(out))
    if shapes is not None:
        with progress(f"writing {output}", lambda: total_bytes(Path(out))) as tell:
            stream_merge(Path(out), shapes, output, force=force, jobs=jobs, tell=tell)
        click.echo(f"Saved in {output} ({directory_size(output)}).")
        return
    with progress(f"reading {out}", lambda: total_bytes(Path(out))) as tell:
        model = load(out, tell=tell)
    record = record_of(model)
    with progress("merging", lambda: record.plan.places if record else 0) as tell:
        merged = merge(model, tell=tell)
    with progress(f"writing {output}", lambda: bytes_of(merged)) as tell:
        save_merged(merged, output, source=Path(out), origin=manifest.origin, force=force, tell=tell)
    kept = record_of(merged)
    for step in kept.plan.steps if kept else ():
        click.echo(f"Kept, since no weight can hold it: {step.statement} ({len(step.parts)} places)")
    click.echo(f"Saved in {output} ({directory_size(output)}).")
