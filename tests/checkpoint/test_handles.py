"""Work that fails before its block is entered leaves no file open."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import surgery
from surgery.checkpoint import merging, streaming
from surgery.checkpoint.extracting import Extracting
from surgery.checkpoint.layout import Slot, layout
from surgery.checkpoint.load import load_either
from surgery.checkpoint.models import load_meta
from surgery.checkpoint.sink import Sink
from surgery.compiler.extract import statement
from surgery.errors import CheckpointError, SurgeryError
from tests.checkpoint.test_base import applied, saved

FILES = Path("/proc/self/fd")
pytestmark = pytest.mark.skipif(not FILES.exists(), reason="the system does not tell")


def leaves_open(work: Callable[[], object], error: type[BaseException]) -> list[str]:
    """Files that are open after a failure, and were not before."""

    def held() -> set[str]:
        return {os.readlink(each) for each in FILES.iterdir() if each.exists()}

    before = held()
    try:
        work()
    except error:
        pass
    else:
        pytest.fail("it must not succeed")
    return sorted(held() - before)


def broken(*_: object, **__: object) -> None:
    raise CheckpointError.of("S420", "on purpose")


def test_work_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = saved("llama", tmp_path / "base")
    wide = saved("llama", tmp_path / "wide", intermediate_size=48)
    plan = surgery.plan(statement(2, "all linear"), load_meta(str(base)).model)
    assert leaves_open(lambda: Extracting(plan, base, wide), SurgeryError) == []
    applied("lora rank 2 on attn", base, tmp_path / "out")
    shapes = surgery.merge(load_either(str(tmp_path / "out"), meta=True).model)
    monkeypatch.setattr(streaming, "content", broken)
    monkeypatch.setattr(merging, "plain", broken)
    assert leaves_open(lambda: streaming.Applying(plan, base), CheckpointError) == []
    assert leaves_open(lambda: merging.Merging(tmp_path / "out", shapes), CheckpointError) == []


def test_files_of_which_one_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    files = [layout(name, [Slot("x", "U8", (1,))]) for name in ("first", "second")]
    assert leaves_open(lambda: Sink(tmp_path, files), IsADirectoryError) == []
    assert (tmp_path / "first").exists()
