"""How many weights each of some matrices keeps, when all together keep a given share (Mocanu 2018; Evci 2020)."""

from __future__ import annotations

from collections.abc import Sequence


def erdos_renyi(sizes: Sequence[tuple[int, int]], share: float) -> list[int]:
    """Erdős-Rényi: of an (out, in) matrix eps (out + in) weights stay, eps such that round(share * all) go.

    A matrix that would keep more than it has is dense, and the others share what is left: solved again until none is.
    Whole numbers by largest remainder, ties by position.
    """
    left = sum(a * b for a, b in sizes)
    left -= round(share * left)
    kept = [0] * len(sizes)
    free = list(range(len(sizes)))
    while free:
        ends = sum(sum(sizes[i]) for i in free)
        dense = [i for i in free if left * sum(sizes[i]) >= ends * sizes[i][0] * sizes[i][1]]
        if not dense:
            break
        for i in dense:
            kept[i] = sizes[i][0] * sizes[i][1]
            left -= kept[i]
        free = [i for i in free if i not in dense]
    if free:
        for i in free:
            kept[i] = left * sum(sizes[i]) // ends
        rest = left - sum(kept[i] for i in free)
        for i in sorted(free, key=lambda i: -(left * sum(sizes[i]) % ends))[:rest]:
            kept[i] += 1
    return kept
