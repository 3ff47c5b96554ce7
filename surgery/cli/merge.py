"""`surgery merge`: fold what was added into plain weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import click

from surgery.cli.arguments import base_option, force_option, jobs_option, out_argument, output_option
from surgery.cli.progress import progress
from surgery.cli.sizes import directory_size

if TYPE_CHECKING:
    from surgery.graph.rounding import Rounding


@click.command()
@out_argument
@output_option
@force_option
@base_option
@jobs_option
@click.option(
    "--requantize", is_flag=True, help="Encode weights that were codes again after the merge, in their format."
)
@click.option("--json", "as_json", is_flag=True, help="Print what rounding did to every tensor as JSON.")
def command(out: str, output: Path, force: bool, base: str | None, jobs: int, requantize: bool, as_json: bool) -> None:
    """Fold the model in OUT into plain weights, in a new directory that `from_pretrained` loads.

    Sums are taken wide and rounded once; what that did to the changes is told. What cannot be folded stays beside the
    weights, and is named. Codes come back at full width, or with --requantize as codes.
    """
    from surgery.checkpoint.staging import check_target

    check_target(output, force)
    from surgery.checkpoint.base import total_bytes
    from surgery.checkpoint.load import load
    from surgery.checkpoint.manifest import Manifest
    from surgery.checkpoint.merging import merged_shapes, stream_merge
    from surgery.checkpoint.save import bytes_of, save_merged
    from surgery.compiler import merge, record_of

    manifest = Manifest.read(Path(out))
    shapes = merged_shapes(Path(out), requantize)
    roundings: dict[str, Rounding]
    if shapes is not None:
        with progress(f"writing {output}", lambda: total_bytes(Path(out), base)) as tell:
            roundings = stream_merge(Path(out), shapes, output, force=force, base=base, jobs=jobs, tell=tell)
        _report(roundings, output, as_json)
        return
    with progress(f"reading {out}", lambda: total_bytes(Path(out), base)) as tell:
        model = load(out, base=base, tell=tell)
    record = record_of(model)
    with progress("merging", lambda: record.plan.places if record else 0) as tell:
        roundings = {}
        merged = merge(model, requantize=requantize, report=roundings, tell=tell)
    with progress(f"writing {output}", lambda: bytes_of(merged)) as tell:
        save_merged(merged, output, source=Path(out), origin=manifest.origin, force=force, tell=tell)
    kept = record_of(merged)
    steps = (
        [step for step in kept.plan.steps if not (requantize and step.operation.phase == "quantize")] if kept else ()
    )
    for step in steps:
        click.echo(f"Kept, since no weight can hold it: {step.statement} ({len(step.parts)} places)", err=as_json)
    _report(roundings, output, as_json)


def _report(roundings: Mapping[str, Rounding], output: Path, as_json: bool) -> None:
    """What rounding did, and where the result lies."""
    from surgery.compiler.merge import drowned

    if lost := drowned(roundings):
        click.echo(f"warning: {lost}", err=True)
    if as_json:
        data = {
            name: {**asdict(one), "error_over_effect": one.relative, "left_alone": one.left_alone}
            for name, one in roundings.items()
        }
        click.echo(json.dumps({"output": str(output), "tensors": data}, indent=2))
        return
    if roundings:
        click.echo(f"Rounding of {len(roundings)} changed tensors       median    worst")
        rows: Sequence[tuple[str, Callable[[Rounding], float]]] = (
            ("error over effect", lambda one: one.relative),
            ("entries left alone", lambda one: one.left_alone),
        )
        for title, figure in rows:
            worst = max(roundings, key=lambda name: figure(roundings[name]))
            middle = median(map(figure, roundings.values()))
            click.echo(f"  {title:<28}{middle:>10.2%}{figure(roundings[worst]):>9.2%}  {worst}")
    click.echo(f"Saved in {output} ({directory_size(output)}).")
