"""Weights that are read or written in place, by code that is not the module's own: rewriting the module misses that."""

from __future__ import annotations

from surgery.anatomy.parts import Anatomy, Part

MAPS = ("projection", "lookup", "bias")  # of which a module of their own is rewritten


def read_in_place(part: Part, anatomy: Anatomy) -> str | None:
    """Why no rewriting of the module at a part's path is a rewriting of the part, None where it is."""
    if part.kind not in MAPS:
        return None
    if not part.path:
        return f"the model itself reads `{part.parameter}`, and only a module inside it can be rewritten"
    if part.written:
        return f"the model writes into `{part.parameter}` as it runs, as if it were plain numbers"
    others = [each for each in anatomy.parts if each.path == part.path and each.kind in MAPS]
    parameters = dict.fromkeys(each.parameter for each in others)
    if len(parameters) > 1:
        return f"one module reads {' and '.join(parameters)}, and only one of its own can be rewritten"
    if part.kind != "bias" and part.parameter != "weight":
        return f"its matrix is called `{part.parameter}`, and what stands in its place calls it `weight`"
    same = dict.fromkeys(each.role for each in others if each.kind != "bias")
    if len({each.kind for each in others} - {"bias"}) > 1:
        return f"{' and '.join(same)} read `{part.parameter}`, one of them without calling the module"
    return None
