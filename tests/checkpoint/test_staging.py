"""A directory appears whole or not at all, whatever happens while it is written."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from surgery.checkpoint.staging import staged
from surgery.errors import CheckpointError


def names(path: Path) -> list[str]:
    return sorted(os.listdir(path))


def test_appears_with_its_files_and_ordinary_permissions(tmp_path: Path) -> None:
    with staged(tmp_path / "out") as partial:
        (partial / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert names(tmp_path) == ["out"]
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("failure", [ValueError(), KeyboardInterrupt(), SystemExit()])
def test_nothing_stays_behind(failure: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(failure)), staged(tmp_path / "out") as partial:  # noqa: PT012
        (partial / "a").write_text("1")
        raise failure
    assert names(tmp_path) == []


def test_existing_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError) as caught, staged(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert caught.value.diagnostics[0].code == "S430"


def test_force_replaces_a_model_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError) as caught, staged(out, force=True):
        pytest.fail("the block must not run")
    assert caught.value.diagnostics[0].code == "S432"
    (out / "surgery.json").write_text("{}")
    with pytest.raises(KeyError), staged(out, force=True):
        raise KeyError
    assert names(out) == ["surgery.json", "thesis.tex"]
    with staged(out, force=True) as partial:
        (partial / "new").write_text("1")
    assert names(tmp_path) == ["out"]
    assert names(out) == ["new"]


def test_someone_else_was_faster(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught, staged(tmp_path / "out"):  # noqa: PT012
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("1")
    assert caught.value.diagnostics[0].code == "S430"
    assert names(tmp_path / "out") == ["theirs"]


@pytest.mark.parametrize("place", ["missing/out", "file/out"])
def test_impossible_places(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError) as caught, staged(tmp_path / place):
        pytest.fail("the block must not run")
    assert caught.value.diagnostics[0].code == "S431"
    assert names(tmp_path) == ["file"]


def test_full_disk_by_its_error_number(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught, staged(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.diagnostics[0].code == "S433"
    assert names(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB, where mounting one is allowed."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here; the test by error number stands in")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_full_disk_for_real(small_disk: Path) -> None:
    with pytest.raises(CheckpointError) as caught, staged(small_disk / "out") as partial:
        (partial / "a").write_bytes(bytes(1 << 20))
    assert caught.value.diagnostics[0].code == "S433"
    assert names(small_disk) == []
