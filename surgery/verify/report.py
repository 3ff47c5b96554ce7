"""What verification found: each promise at each place, its measured error and the bound it was held to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

Status = Literal["holds", "close", "fails", "skipped"]
CLOSE = 0.5
"""Above this share of its bound an error is reported as close: the bound or the code deserves a look."""
_SYMBOLS: dict[Status, str] = {"holds": "ok", "close": "close", "fails": "FAILS", "skipped": "-"}


@dataclass(frozen=True)
class Finding:
    """One promise at one place.

    place: a module path, a tensor's name, or `model`. sites: how many equal places this one stands for.
    error, bound: in the promise's own unit (relative to the largest value for numbers, a count for counts); a bound of
        zero asks for equality. skipped: why the promise could not be checked here, empty when it was. told: what is to
        be known of it even where it holds.
    """

    promise: str
    place: str
    error: float = 0.0
    bound: float = 0.0
    statement: str = ""
    note: str = ""
    skipped: str = ""
    sites: int = 1
    told: str = ""

    @property
    def ratio(self) -> float:
        """error / bound; infinite where equality was asked for and is missed."""
        if math.isnan(self.error):
            return math.inf
        if self.bound == 0:
            return 0.0 if self.error == 0 else math.inf
        return self.error / self.bound

    @property
    def status(self) -> Status:
        if self.skipped:
            return "skipped"
        if self.ratio > 1:
            return "fails"
        return "close" if self.ratio > CLOSE else "holds"

    def to_json(self) -> dict[str, Any]:
        """Plain data; an infinite ratio is left out, since JSON has no infinity."""
        data: dict[str, Any] = {"promise": self.promise, "place": self.place, "status": self.status}
        if self.skipped:
            return data | {"reason": self.skipped, "statement": self.statement}
        data |= {"error": _finite(self.error), "bound": self.bound, "statement": self.statement, "sites": self.sites}
        data |= {"told": self.told} if self.told else {}
        return data | ({"note": self.note} if self.note else {})


@dataclass(frozen=True)
class Report:
    """All findings; true when no promise failed and at least one was checked."""

    findings: tuple[Finding, ...]

    def __bool__(self) -> bool:
        return not self.failures and any(finding.status != "skipped" for finding in self.findings)

    @property
    def failures(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.status == "fails")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """Held, but by less than half of the bound."""
        return tuple(finding for finding in self.findings if finding.status == "close")

    def of(self, promise: str) -> tuple[Finding, ...]:
        """Findings of one promise."""
        return tuple(finding for finding in self.findings if finding.promise == promise)

    def promises(self) -> tuple[str, ...]:
        """Names of the promises looked at, in order."""
        return tuple(dict.fromkeys(finding.promise for finding in self.findings))

    def to_json(self) -> dict[str, Any]:
        return {"holds": bool(self), "findings": [finding.to_json() for finding in self.findings]}

    def __str__(self) -> str:
        rows = [("promise", "places", "worst error", "bound", "ratio", "")]
        notes: list[str] = []
        for promise, group in groupby(sorted(self.findings, key=lambda f: self.promises().index(f.promise)), _name):
            found = list(group)
            checked = [finding for finding in found if not finding.skipped]
            if checked:
                worst = max(checked, key=lambda finding: (finding.ratio, finding.error))
                rows.append(_row(promise, sum(finding.sites for finding in checked), worst))
            else:
                rows.append((promise, "-", "-", "-", "-", "not checked"))
            notes += _notes(found)
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(
                cell.ljust(w) if i in (0, 5) else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        return "\n".join([line.rstrip() for line in lines] + notes)


def _justified(row: tuple[str, ...], widths: list[int]) -> Iterator[str]:
    """Names and marks to the left, numbers to the right."""
    for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
        yield cell.ljust(width) if column in (0, len(row) - 1) else cell.rjust(width)


def _name(finding: Finding) -> str:
    return finding.promise


def _row(promise: str, places: int, worst: Finding) -> tuple[str, str, str, str, str, str]:
    ratio = "equal" if worst.bound == 0 and worst.ratio == 0 else f"{worst.ratio:.2g}"
    bound = "0" if worst.bound == 0 else f"{worst.bound:.2g}"
    return promise, str(places), f"{worst.error:.2g}", bound, ratio, _SYMBOLS[worst.status]


def _notes(found: list[Finding]) -> Iterator[str]:
    """One line for each failure, each thing to be known, and each reason not to have checked."""
    for finding in found:
        if finding.status in ("fails", "close"):
            word = "fails" if finding.status == "fails" else "is close to its bound"
            because = f": {finding.note}" if finding.note else ""
            said = f" ({finding.statement})" if finding.statement else ""
            yield f"{finding.promise} {word} at {finding.place}{said}{because}"
        if finding.told:
            yield f"{finding.promise} at {finding.place}: {finding.told}"
    for reason in dict.fromkeys(finding.skipped for finding in found if finding.skipped):
        yield f"{found[0].promise} not checked: {reason}"


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
