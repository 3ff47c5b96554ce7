"""A report as one HTML page that needs nothing else: plots in SVG, light and dark, each with its numbers in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, Any

from surgery.cli.sizes import readable

if TYPE_CHECKING:
    from surgery.checkpoint.report import Facts, Magnitudes, Units
    from surgery.compiler.zeros import Cell

STYLE = """
:root { color-scheme: light dark; --page: #fbfbf9; --ink: #1f2328; --soft: #656d76; --line: #d8dbdf; --card: #fff;
  --empty: #eceef0; --heat: #b3261e; --kept: #2f6fb0; --cut: #d97706; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --ink: #e6e8ea; --soft: #99a1a9; --line: #343a41;
  --card: #1b1f23; --empty: #2a2f35; --heat: #ff8a75; --kept: #6cb0f5; --cut: #f5b04c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 62rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.6rem 0 .3rem; }
h3 { font-size: .95rem; margin: 0 0 .3rem; font-weight: 600; }
p { margin: .2rem 0 .8rem; } .soft { color: var(--soft); }
pre, code { font: .88rem/1.5 ui-monospace, monospace; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem;
  overflow-x: auto; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem; margin: 1.2rem 0; }
.tile, .plot { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.3rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: .8rem; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
svg .on { fill: var(--ink); } svg .axis { stroke: var(--line); }
.empty { fill: var(--empty); } .heat { fill: var(--heat); } .kept { fill: var(--kept); } .cut { fill: var(--cut); }
.key { display: inline-block; width: .75rem; height: .75rem; border-radius: 2px; vertical-align: -1px; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem 1.1rem .25rem 0; border-bottom: 1px solid var(--line); }
td.n, th.n { text-align: right; } details { margin-top: .6rem; } summary { cursor: pointer; color: var(--soft); }
"""
CELL, GAP, LEFT = 22, 2, 78


def page(name: str, facts: Facts) -> str:
    """The whole document."""
    about = facts.about
    made = f", made from {about['origin']}" if about.get("origin") else ""
    body = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="soft">{escape(str(about["model"]))}{escape(made)}, by surgery {escape(about["version"])}</p>',
        f"<pre>{escape(about['program'].strip())}</pre>",
        *_tiles(facts),
        *_sparsity(facts.cells),
        *_magnitudes(facts),
        *_units(facts),
        *_files(about),
        *_promises(about["promises"]),
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    title = f"<title>{escape(name)}: what was changed</title>"
    return f'<!doctype html>\n<html lang="en">\n<head>{head}{title}<style>{STYLE}</style></head>\n<body><main>\n' + (
        "\n".join(body) + "\n</main></body>\n</html>\n"
    )


def _tiles(facts: Facts) -> Iterator[str]:
    totals = facts.totals
    before, after = totals["bytes_before"], totals["bytes_after"]
    zeros = sum(cell.zeros or 0 for cell in facts.cells)
    size = sum(cell.size for cell in facts.cells)
    change = f"{after / before - 1:+.1%}" if before else ""
    told = [
        (f"{readable(before)} → {readable(after)}", f"all tensors, {change}"),
        (f"{totals['trainable']:,}", f"of {totals['parameters'] + totals['added']:,} parameters are trained"),
        (f"{zeros / size:.1%}" if size else "-", f"of {size:,} weights in the layers are zero"),
        *((f"{before} → {after}", f"layers of the {stack}") for stack, before, after in facts.depths),
    ]
    tiles = "".join(
        f'<div class="tile"><b>{escape(top)}</b><span class="soft">{escape(low)}</span></div>' for top, low in told
    )
    yield f'<div class="tiles">{tiles}</div>'


def _sparsity(cells: Sequence[Cell]) -> Iterator[str]:
    if not any(cell.zeros for cell in cells):
        return
    yield "<h2>Zeros by layer and role</h2>"
    yield '<p class="soft">The share of each weight that is zero; the fuller the colour, the more.</p>'
    for stack in dict.fromkeys(cell.stack for cell in cells):
        mine = [cell for cell in cells if cell.stack == stack]
        yield f'<div class="plot">{_heat(stack or "model", mine)}{_table(mine)}</div>'


def _heat(stack: str, cells: Sequence[Cell]) -> str:
    roles = list(dict.fromkeys(cell.role for cell in cells))
    depth = 1 + max(cell.layer or 0 for cell in cells)
    width, height = LEFT + depth * (CELL + GAP) + 52, 20 + len(roles) * (CELL + GAP)
    drawn = []
    for layer in range(0, depth, 1 if depth <= 16 else 4):
        drawn.append(f'<text x="{LEFT + layer * (CELL + GAP) + CELL / 2}" y="12" text-anchor="middle">{layer}</text>')
    for row, role in enumerate(roles):
        y, mine = 18 + row * (CELL + GAP), [cell for cell in cells if cell.role == role]
        drawn.append(f'<text class="on" x="{LEFT - 8}" y="{y + 15}" text-anchor="end">{escape(role)}</text>')
        for cell in mine:
            share = (cell.zeros or 0) / cell.size
            box = f'x="{LEFT + (cell.layer or 0) * (CELL + GAP)}" y="{y}" width="{CELL}" height="{CELL}" rx="3"'
            said = f"<title>{escape(role)}, layer {cell.layer}: {share:.2%} of {cell.size:,}</title>"
            drawn.append(f'<g>{said}<rect class="empty" {box}/><rect class="heat" {box} opacity="{share:.3f}"/></g>')
        total = sum(cell.zeros or 0 for cell in mine) / sum(cell.size for cell in mine)
        drawn.append(f'<text class="on" x="{width}" y="{y + 15}" text-anchor="end">{total:.1%}</text>')
    worst = max(cells, key=lambda cell: (cell.zeros or 0) / cell.size)
    said = f"{len(roles)} roles in {depth} layers; the most zeros has {worst.role} in layer {worst.layer}"
    limit = f' style="max-width: {max(width * 1.5, 420):.0f}px"'
    return _svg(f"zeros-{stack}", f"Share of zeros in the {stack}", said, width, height, drawn, limit)


def _table(cells: Sequence[Cell]) -> str:
    rows = []
    for role, group in groupby(sorted(cells, key=lambda cell: cell.role), key=lambda cell: cell.role):
        mine = list(group)
        shares = sorted((cell.zeros or 0) / cell.size for cell in mine)
        total = sum(cell.zeros or 0 for cell in mine) / sum(cell.size for cell in mine)
        rows.append([role, f"{len(mine)}", f"{shares[0]:.2%}", f"{total:.2%}", f"{shares[-1]:.2%}"])
    grid = _grid(["role", "weights", "least", "all together", "most"], rows)
    return f"<details><summary>The numbers</summary>{grid}</details>"


def _magnitudes(facts: Facts) -> Iterator[str]:
    shown = {role: found for role, found in facts.magnitudes.items() if any((*found.kept, *found.cut))}
    if not shown:
        return
    yield "<h2>What was kept, and what was cut</h2>"
    cut = (
        '<span class="key" style="background: var(--cut)"></span> what is zero now, as large as it was in the base'
        if facts.compared
        else "what was cut had its size in the base, which is gone or has other layers"
    )
    kept = '<span class="key" style="background: var(--kept)"></span> weights that stayed'
    yield f'<p class="soft">Weights by magnitude, in half octaves. {kept}; {cut}.</p><div class="plots">'
    for role, found in shown.items():
        known = sum(found.cut) / found.gone if facts.compared else 1
        note = f'<span class="soft">the size of {known:.0%} of what is zero is known</span>' if known < 0.99 else ""
        yield f'<div class="plot"><h3>{escape(role)}</h3>{_histogram(role, found)}{note}</div>'
    yield "</div>"


def _histogram(role: str, found: Magnitudes) -> str:
    from surgery.checkpoint.report import LOW

    both = [kept + cut for kept, cut in zip(found.kept, found.cut, strict=True)]
    first, last = _middle(both)
    kept, cut = (_trimmed(counts, first, last) for counts in (found.kept, found.cut))
    top = max(a + b for a, b in zip(kept, cut, strict=True))
    width, height = 280.0, 130
    step = width / (last - first + 1)
    drawn = []
    for index in range(first, last + 1):
        x, y = (index - first) * step, float(height)
        for kind, count in (("cut", cut[index - first]), ("kept", kept[index - first])):
            tall = (height - 8) * count / top
            y -= tall
            size = 2.0 ** (LOW + index / 2)
            said = f"<title>{count:,} {kind}, from {size:.2g} to {size * 2**0.5:.2g}</title>"
            box = f'x="{x + 0.5:.1f}" y="{y:.1f}" width="{step - 1:.1f}" height="{tall:.1f}"'
            drawn += [f'<rect class="{kind}" {box}>{said}</rect>'] if count else []
    drawn.append(f'<line class="axis" x1="0" x2="{width}" y1="{height}" y2="{height}"/>')
    for index, anchor in ((first, "start"), ((first + last) // 2, "middle"), (last, "end")):
        place = {"start": 0.0, "middle": width / 2, "end": width}[anchor]
        drawn.append(
            f'<text x="{place}" y="{height + 14}" text-anchor="{anchor}">{2.0 ** (LOW + index / 2):.2g}</text>'
        )
    said = f"{sum(found.kept):,} weights stayed; of {sum(found.cut):,} that were cut the size is known"
    return _svg(f"sizes-{role}", f"Magnitudes of {role}", said, width, height + 18, drawn)


def _middle(counts: Sequence[int]) -> tuple[int, int]:
    """The first and the last bin of those that are worth their room: at each end a thousandth may lie further off."""
    few = sum(counts) / 1000
    first = next(index for index in range(len(counts)) if sum(counts[: index + 1]) > few)
    last = next(index for index in reversed(range(len(counts))) if sum(counts[index:]) > few)
    return first, last


def _trimmed(counts: Sequence[int], first: int, last: int) -> list[int]:
    """The bins from first to last, with what lies further off in those at the ends."""
    inside = list(counts[first : last + 1])
    inside[0] += sum(counts[:first])
    inside[-1] += sum(counts[last + 1 :])
    return inside


def _units(facts: Facts) -> Iterator[str]:
    if not facts.units:
        return
    yield "<h2>What was cut out</h2>"
    yield '<p class="soft">Neurons and heads that stayed at each place, of as many as there were.</p>'
    for statement, group in groupby(facts.units, key=lambda unit: unit.statement):
        mine = list(group)
        yield f'<div class="plot"><h3><code>{escape(statement)}</code></h3>{_bars(statement, mine)}</div>'


def _bars(statement: str, units: Sequence[Units]) -> str:
    left, long, high = 230, 300, 18
    drawn = []
    for row, unit in enumerate(units):
        y, share = row * high, unit.kept / unit.count
        drawn.append(f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{escape(_short(unit.place))}</text>')
        drawn.append(f'<rect class="empty" x="{left}" y="{y + 2}" width="{long}" height="{high - 5}" rx="2"/>')
        drawn.append(
            f'<rect class="kept" x="{left}" y="{y + 2}" width="{long * share:.1f}" height="{high - 5}" rx="2"/>'
        )
        drawn.append(f'<text class="on" x="{left + long + 8}" y="{y + 12}">{unit.kept:,} of {unit.count:,}</text>')
    said = f"{len(units)} places; {sum(unit.kept for unit in units):,} of {sum(unit.count for unit in units):,} stayed"
    return _svg(f"units-{statement}", statement, said, left + long + 110, len(units) * high, drawn)


def _short(path: str) -> str:
    return path if len(path) <= 34 else f"...{path[-31:]}"


def _files(about: Any) -> Iterator[str]:
    yield "<h2>Files</h2>"
    rows = [
        [
            file["name"],
            readable(file["bytes"]),
            f"{file['tensors']:,}",
            ", ".join(f"{count:,} {dtype}" for dtype, count in file["elements"].items()),
        ]
        for file in about["files"]
    ]
    yield _grid(["file", "size", "tensors", "numbers"], rows)


def _promises(promises: Any) -> Iterator[str]:
    yield "<h2>Promises</h2>"
    if promises is None:
        yield '<p class="soft">Not verified yet: <code>surgery verify</code> does, and keeps what it finds here.</p>'
        return
    broken = {said.partition(" at ")[0] for said in promises["broken"]}
    rows = [[name, "BROKEN" if name in broken else "kept"] for name in promises["names"]]
    yield _grid(["promise", ""], [*rows, *([name, "not checked"] for name in promises["unchecked"])])


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; cells that begin with a digit stand to the right."""
    number = [bool(rows) and all(row[column][:1].isdigit() for row in rows) for column in range(len(head))]
    marks = [' class="n"' if right else "" for right in number]
    top = "".join(f'<th scope="col"{mark}>{escape(cell)}</th>' for mark, cell in zip(marks, head, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{mark}>{escape(cell)}</td>" for mark, cell in zip(marks, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _svg(key: str, title: str, said: str, width: float, height: float, drawn: Sequence[str], more: str = "") -> str:
    """A picture that tells what it shows to who does not see it."""
    mark = "".join(letter if letter.isalnum() else "-" for letter in key)
    head = f'<title id="{mark}-t">{escape(title)}</title><desc id="{mark}-d">{escape(said)}.</desc>'
    box = f'viewBox="0 0 {width:g} {height:g}" role="img" aria-labelledby="{mark}-t {mark}-d"'
    return f"<svg {box}{more}>{head}{''.join(drawn)}</svg>"
