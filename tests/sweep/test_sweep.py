"""Every text model type of transformers is studied rightly or refused (promise: no wrong label, no table).

About five minutes on two idle cores; `SURGERY_SWEEP=FILE` judges the rows that `driver.py -o FILE` wrote before.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.sweep import driver, oracle


def rows() -> list[dict[str, Any]]:
    written = os.environ.get("SURGERY_SWEEP")
    if written:
        return [json.loads(line) for line in Path(written).read_text().splitlines()]
    return driver.sweep(driver.model_types())


def line(row: dict[str, Any]) -> str:
    start = f"{row['task']:8}{row['type']:28}{row['status']:14}"
    if row["status"] != "studied":
        return start + row.get("why", "")[:90]
    roles = [part["role"] for part in row["parts"]]
    families = dict.fromkeys(role.partition(".")[0] for role in roles if role not in ("layer", "linear", "lookup"))
    calls = sum(part["kind"] == "attention" for part in row["parts"])
    return f"{start}{row['seconds']:6.1f} s {calls:3} calls  {' '.join(families)}"


@pytest.mark.slow
def test_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    found = rows()
    studied = [row for row in found if row["status"] == "studied"]
    attending = [row for row in studied if any(part["kind"] == "attention" for part in row["parts"])]
    complete = [row for row in attending if not oracle.missing(row)]
    fed = [row for row in studied if any(part["role"].startswith("ffn.") for part in row["parts"])]
    mistakes = [
        f"{row['task']} {row['type']}: {said}"
        for row in studied
        for part in row["parts"]
        if (said := oracle.wrong(part))
    ]
    with capsys.disabled():
        print("", *map(line, found), sep="\n")
        print(f"{len(studied)} of {len(found)} studied, ffn in {len(fed)}")
        print(f"attention in {len(attending)}, all of q, k, v and o in {len(complete)}")
        for row in attending:
            for gap in oracle.missing(row):
                print(f"  {row['task']} {row['type']}: {gap}")
        print(*mistakes, sep="\n")
    assert not mistakes
    assert len(attending) - len(complete) <= 2
    assert len(complete) >= 213
    assert len(fed) >= 223
