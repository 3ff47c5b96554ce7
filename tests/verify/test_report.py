"""A report holds us to: true only when something was checked and nothing failed; readable as a table and as JSON."""

from __future__ import annotations

import json
import math

import torch

from surgery.verify.bounds import merge_bound, relative_error
from surgery.verify.report import Finding, Report

HOLDS = Finding("merges", "a.b", 1e-8, 1e-6, "lora rank 1 on attn.q", sites=4)
CLOSE = Finding("merges", "a.c", 7e-7, 1e-6)
FAILS = Finding("frame", "a.d", 2.0, 0.0, note="moved")
SKIPPED = Finding("round_trip", "model", skipped="it is too large")


def test_the_ratio_decides() -> None:
    assert [each.status for each in (HOLDS, CLOSE, FAILS, SKIPPED)] == ["holds", "close", "fails", "skipped"]
    assert math.isinf(FAILS.ratio)
    assert Finding("x", "y", float("nan"), 1.0).status == "fails"
    assert Finding("x", "y", 0.0, 0.0).status == "holds"


def test_a_report_is_true_when_something_was_checked_and_nothing_failed() -> None:
    assert Report((HOLDS, CLOSE, SKIPPED))
    assert not Report((HOLDS, FAILS))
    assert not Report((SKIPPED,))
    assert not Report(())
    assert Report((HOLDS, CLOSE)).warnings == (CLOSE,)
    assert Report((HOLDS, FAILS)).failures == (FAILS,)


def test_the_table_has_the_worst_of_each_promise_and_every_reason() -> None:
    text = str(Report((HOLDS, CLOSE, FAILS, SKIPPED)))
    (merges,) = (line for line in text.splitlines() if line.startswith("merges  "))
    assert "7e-07" in merges
    assert " 5 " in merges, "four equal places and one more"
    assert "FAILS" in text
    assert "frame fails at a.d: moved" in text
    assert "round_trip not checked: it is too large" in text


def test_json_has_no_infinities() -> None:
    data = json.loads(json.dumps(Report((HOLDS, FAILS, SKIPPED)).to_json(), allow_nan=False))
    assert data["holds"] is False
    assert [finding["status"] for finding in data["findings"]] == ["holds", "fails", "skipped"]


def test_errors_are_relative_to_the_largest_value() -> None:
    wanted = torch.tensor([0.0, 4.0])
    assert relative_error(torch.tensor([1.0, 4.0]), wanted) == 0.25
    assert relative_error(wanted, wanted) == 0
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert math.isinf(relative_error(torch.ones(2), torch.zeros(2)))
    assert math.isinf(relative_error(torch.ones(3), wanted))


def test_the_bound_grows_with_eps_depth_and_branch() -> None:
    assert merge_bound(torch.float64) == 16 * 2**-52
    assert merge_bound(torch.bfloat16, 3, 1.0) == 16 * 2**-7 * 3 * 2
