"""What a misspelt word may have been meant for."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that is most like this one, None when nothing is."""
    table = {candidate.lower(): candidate for candidate in known}
    lowered = word.lower()
    if lowered in table:
        return table[lowered]
    found = get_close_matches(lowered[:80], table, n=1, cutoff=0.6)  # difflib takes quadratic time
    if found:
        return table[found[0]]
    longer = sorted(candidate for candidate in table if len(lowered) > 2 and candidate.startswith(lowered))
    return table[longer[0]] if longer else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean 'rank'?`, or the empty string."""
    found = nearest(word, known)
    return f"did you mean '{found}'?" if found else ""


def listed(words: Iterable[object], last: str = "or") -> str:
    """`a, b or c`."""
    *head, tail = [str(word) for word in words] or [""]
    return f"{', '.join(head)} {last} {tail}" if head else tail
