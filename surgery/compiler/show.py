"""A plan as people read it, made from its JSON alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

SYMBOLS = {"attach": "+", "train": "+"}


def show(plan: Mapping[str, Any]) -> str:
    """What changes by statement, role and layers; what is added, what it costs, what a merge does; warnings last."""
    totals = plan["totals"]
    before = {path: depth for _, path, depth in plan.get("given", plan)["stacks"]}
    depth = ", ".join(f"{_depth(before.get(path), depth)} {name} layers" for name, path, depth in plan["stacks"])
    head = [plan["model"], depth, f"{short(totals['parameters'])} parameters", size(totals["bytes_before"])]
    lines = ["Plan for " + ", ".join(filter(None, head)), ""]
    for step in plan["steps"]:
        there = "  (already there)" if step.get("standing") else ""
        lines += [f"  {step['statement']}{there}", *_step(step), ""]
    lines += [*_totals(totals), *(f"  Note       {note}" for note in plan.get("notes", ()))]
    lines += [f"  Warning    {warning}" for warning in plan["warnings"]]
    return "\n".join(lines)


def _depth(before: int | None, after: int) -> str:
    return f"{after}" if before in (None, after) else f"{before} -> {after}"


def _step(step: Mapping[str, Any]) -> list[str]:
    symbol = "-" if step.get("freezes") else step.get("sign") or SYMBOLS.get(step["phase"], "~")
    rows = []
    for parts in _groups(step["parts"]):
        first = parts[0]
        rows.append((first["role"], layers(parts), _shape(first), f"{len(parts)}", pattern(first)))
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(4)]
    lines = [
        f"    {symbol} "
        + "  ".join((a.ljust(widths[0]), b.ljust(widths[1]), c.ljust(widths[2]), n.rjust(widths[3]), path))
        for a, b, c, n, path in rows
    ]
    notes = list(step.get("notes", ()))
    if step["parameters_added"]:
        notes.append(f"+{step['parameters_added']:,} parameters")
    if step.get("parameters_trained"):
        notes.append(f"{step['parameters_trained']:,} parameters trained")
    change = step["bytes_changed"]
    if (rows and step["phase"] != "require") or change:
        notes.append(f"{'+' if change >= 0 else '-'}{size(abs(change))}")
    if rows and step["merge"]:
        notes.append("merge: not everywhere, see the warning" if "unmerged" in step else f"merge: {step['merge']}")
    return [*lines, *(["      " + "; ".join(notes)] if notes else [])]


def _shape(part: Mapping[str, Any]) -> str:
    """`576 x 192`, with the rows taken of a fused map; of an attention call, its heads."""
    if "heads" in part:
        heads = part["heads"]
        shared = "" if heads["key_value"] == heads["query"] else f" on {heads['key_value']}"
        return f"{heads['query']} heads{shared} of {heads['key_width']}"
    shape = " x ".join(map(str, part.get("shape", ())))
    if "channels" in part:
        return f"{sum(stop - start for start, stop in part['channels'])} of {shape}"
    return shape


def _groups(parts: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Parts that differ in their layer alone."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for part in parts:
        key = (part["role"], part.get("stack"), tuple(part.get("shape", ())), pattern(part))
        groups.setdefault(key, []).append(part)
    return list(groups.values())


def layers(parts: Iterable[Mapping[str, Any]]) -> str:
    """`layers 0..11`, `layers 0..3, 8`, with the stack's name where it isn't the only kind of one."""
    numbers = sorted({part["layer"] for part in parts if part.get("layer") is not None})
    if not numbers:
        return ""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "layers " + ", ".join(f"{a}..{b}" if b > a else f"{a}" for a, b in runs)


def pattern(part: Mapping[str, Any]) -> str:
    """The module path with `*` for the layer's number."""
    path: str = part["path"] or "the model"
    if part["kind"] in ("bias", "tensor") and part["role"] != "bias.new":
        path = f"{path}.{part['parameter']}"
    layer = part.get("layer")
    return path if layer is None else re.sub(rf"(^|\.){layer}(\.|$)", r"\1*\2", path, count=1)


def _totals(totals: Mapping[str, Any]) -> list[str]:
    share = totals["trainable_share"]
    after, before = totals["bytes_after"], totals["bytes_before"]
    ratio = f" ({after / before - 1:+.1%})" if before else ""
    return [
        f"  Trainable  {totals['trainable']:,} of {totals['parameters'] + totals['added']:,} parameters ({share:.3%})",
        f"  Memory     {size(before)} -> {size(after)}{ratio}",
    ]


def short(count: float) -> str:
    """134.5 M"""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.1f} {unit}"
    return f"{count:g}"


def size(count: float) -> str:
    """Bytes in decimal units: 269.0 MB."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= limit:
            return f"{count / limit:.1f} {unit}"
    return f"{count:g} B"
