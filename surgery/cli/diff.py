"""`surgery diff`: two directories, tensor by tensor."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from surgery.cli.arguments import after_argument, base_option, before_argument
from surgery.cli.errors import FAILED
from surgery.cli.progress import progress

if TYPE_CHECKING:
    from surgery.checkpoint.compare import Difference


@click.command()
@before_argument
@after_argument
@click.option("--json", "as_json", is_flag=True, help="As JSON, one entry for each tensor.")
@click.option("--all", "every", is_flag=True, help="Show equal tensors as well.")
@base_option
@click.pass_context
def command(ctx: click.Context, before: Path, after: Path, as_json: bool, every: bool, base: str | None) -> None:
    """Compare the tensors of two model directories, a stretch at a time.

    Layers that changed alike share a line: the share of entries that changed, the error relative to A in norms, the
    largest single difference, and zeros in A and in B. Exit status 1 when anything differs.
    """
    from surgery.checkpoint import compare
    from surgery.checkpoint.models import directory_of

    old, new = directory_of(str(before)), directory_of(str(after))
    with progress("comparing", lambda: sum(compare.bytes_of(one, base) for one in (old, new))) as tell:
        found = list(compare.compare(old, new, tell, base=base))
    counts = compare.summary(found)
    if as_json:
        click.echo(json.dumps({"counts": counts, "tensors": [each.to_json() for each in found]}, indent=1))
    else:
        for line in table([each for each in found if every or not each.same]):
            click.echo(line)
        click.echo(", ".join(f"{count} {kind}" for kind, count in counts.items()))
    ctx.exit(0 if counts["same"] == len(found) else FAILED)


def table(differences: Sequence[Difference]) -> list[str]:
    """Rows with aligned columns; tensors whose names differ in numbers only share a row."""
    groups: dict[tuple[str, str | None, str | None, bool], list[Difference]] = {}
    for each in differences:
        key = (re.sub(r"(?<=\.)\d+(?=\.)", "*", each.name), each.before, each.after, each.same)
        groups.setdefault(key, []).append(each)
    rows = [["tensor", "", "A", "B", "changed", "error", "largest", "zeros"]] if groups else []
    for (pattern, before, after, _), members in groups.items():
        shown = [f"{len(members)}" if len(members) > 1 else "", before or "-", after or "-"]
        shown += [_range([each.changed for each in members], "{:.1%}")]
        shown += [_range([each.error for each in members], "{:.1e}")]
        shown += [_range([each.largest for each in members], "{:.1e}")]
        zeros = [each.zeros for each in members if each.zeros is not None]
        shown += [" -> ".join(f"{sum(z[i] for z in zeros) / len(zeros):.1%}" for i in (0, 1)) if zeros else ""]
        rows.append([pattern, *shown])
    widths = [max(len(row[i]) for row in rows) for i in range(8)] if rows else []
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _range(values: Sequence[float | None], form: str) -> str:
    """The least and the largest, or the only one."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    ends = list(dict.fromkeys(form.format(value) for value in (min(known), max(known))))
    return "..".join(ends)
