"""A run that is killed leaves what was there; the next one goes on, and ends with the bytes of one undisturbed."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from surgery.checkpoint import sink as sinks
from surgery.checkpoint import staging, work
from surgery.checkpoint.manifest import Manifest
from surgery.checkpoint.models import load_meta
from surgery.checkpoint.staging import staged
from surgery.checkpoint.standalone import Completing
from surgery.checkpoint.streaming import Applying, stream
from surgery.errors import CheckpointError
from tests import zoo
from tests.checkpoint.test_streaming import files

PROGRAM = "prune magnitude 50% on ffn; lora rank 2 dora on attn"
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a process that it forks")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A fork has none of the threads of OpenMP's pool, and would wait for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    zoo.tiny("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    return tmp_path / "base"


def run(base: Path, name: str, program: str = PROGRAM, force: bool = False) -> Path:
    plan = surgery.plan(surgery.parse(program), load_meta(str(base)).model)
    stream(plan, base, base.parent / name, origin=str(base), force=force)
    return base.parent / name


def killed(
    base: Path,
    name: str,
    at: int,
    lines: int = 0,
    force: bool = False,
    program: str = PROGRAM,
    do: Callable[[], object] | None = None,
) -> bool:
    """Run in another process that dies at a write, or at a later one, when its journal has so many lines.

    Whether it did, or was done before. do: what to run instead.
    """
    child = os.fork()
    if not child:
        count, write = 0, sinks.write_all
        journal = base.parent / f".{name}.partial" / "journal"

        def counted(*args: Any) -> None:
            nonlocal count
            count += 1
            if count >= at and journal.read_bytes().count(b"\n") >= lines:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.01)  # others have the time to keep the journal
            write(*args)

        sinks.write_all = counted
        work.PAUSE = 0
        try:
            run(base, name, program, force) if do is None else do()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(("at", "lines"), [(1, 0), (5, 0), (10, 2), (20, 4)])
def test_resumed_to_the_same_bytes(at: int, lines: int, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = files(run(base, "whole"))
    assert killed(base, "out", at, lines)
    assert sorted(os.listdir(base.parent)) == [".out.partial", "base", "whole"]
    done: list[int] = []
    do = Applying.do
    monkeypatch.setattr(Applying, "do", lambda self, unit, sink: done.append(unit) or do(self, unit, sink))
    assert files(run(base, "out")) == whole
    assert sorted(os.listdir(base.parent)) == ["base", "out", "whole"]
    units = Applying(surgery.plan(surgery.parse(PROGRAM), load_meta(str(base)).model), base).units
    assert len(done) == len(set(done)) <= units
    assert len(done) < units or not lines


def test_a_result_that_refers_to_its_base_is_gone_on_with(base: Path) -> None:
    """What the journal has of tensors that were read and not written counts; a copy of the base is another work."""
    program = "lora rank 2 dora on all linear"
    whole = files(run(base, "whole", program))
    assert not [name for name in whole if name.startswith("model")]
    assert killed(base, "out", 12, 3, program=program)
    plan = surgery.plan(surgery.parse(program), load_meta(str(base)).model)
    with pytest.raises(CheckpointError, match="another way to keep the base"):
        stream(plan, base, base.parent / "out", origin=str(base), force=False, standalone=True)
    assert files(run(base, "out", program)) == whole
    assert sorted(os.listdir(base.parent)) == ["base", "out", "whole"]


@pytest.mark.parametrize(("at", "lines"), [(1, 0), (12, 3)])
def test_a_base_that_is_copied_later(at: int, lines: int, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed, it leaves no directory; what was copied is not copied again, unless it is another thing by now."""
    adapter = run(base, "adapter", "lora rank 2 on attn")
    surgery.export(adapter, base.parent / "whole", to="standalone")
    export = partial(surgery.export, adapter, base.parent / "out", to="standalone")
    assert killed(base, "out", at, lines, do=export)
    assert sorted(os.listdir(base.parent)) == [".out.partial", "adapter", "base", "whole"]
    path = adapter / "surgery.safetensors"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    os.utime(path, ns=(times[0], times[1] + 1))
    with pytest.raises(CheckpointError, match="another source"):
        export()
    os.utime(path, ns=times)
    done: list[int] = []
    do = Completing.do
    monkeypatch.setattr(Completing, "do", lambda self, unit, sink: done.append(unit) or do(self, unit, sink))
    export()
    assert files(base.parent / "out") == files(base.parent / "whole")
    assert sorted(os.listdir(base.parent)) == ["adapter", "base", "out", "whole"]
    units = len(Manifest.read(adapter).tensors)
    assert len(done) == len(set(done)) <= units
    assert len(done) < units or not lines


def test_killed_again_and_again(base: Path) -> None:
    whole = files(run(base, "whole"))
    kills = sum(killed(base, "out", 9, 2) for _ in range(6))
    assert kills >= 3
    assert files(run(base, "out", force=True)) == whole


def test_what_is_replaced_stays_until_the_end(base: Path) -> None:
    before = files(run(base, "out", "train norm"))
    assert killed(base, "out", 20, force=True)
    assert files(base.parent / "out") == before
    assert files(run(base, "out", force=True)) != before
    assert sorted(os.listdir(base.parent)) == ["base", "out"]


def refused(code: str, base: Path, program: str = PROGRAM) -> str:
    with pytest.raises(CheckpointError) as caught:
        run(base, "out", program)
    assert caught.value.diagnostics[0].code == code
    assert not (base.parent / "out").exists()
    return str(caught.value)


def test_another_program_or_source_does_not_go_on(base: Path) -> None:
    assert killed(base, "out", 20)
    assert "another program" in refused("S434", base, "train norm")
    path = next(base.glob("*.safetensors"))
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    os.utime(path, ns=(times[0], times[1] + 1))
    assert "another source" in (said := refused("S434", base))
    os.utime(path, ns=times)
    assert len(files(run(base, "out"))) > 3
    assert f"rm -r {base.parent / '.out.partial'}" in said


def test_a_run_without_a_journal_does_not_clear_one(base: Path) -> None:
    assert killed(base, "out", 20)
    with pytest.raises(CheckpointError, match="S434"), staged(base.parent / "out"):
        pytest.fail("the block must not run")
    assert (base.parent / ".out.partial" / "journal").stat().st_size > 100


def test_two_runs_to_one_place(base: Path) -> None:
    with staged(base.parent / "out") as aside:
        (aside / "a").write_text("1")
        refused("S435", base)
    assert sorted(os.listdir(base.parent / "out")) == ["a"]


def test_space_is_looked_for_first(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6, 1000))
    monkeypatch.setattr(sinks, "write_all", lambda *args: pytest.fail("nothing must be written"))
    assert "are free" in refused("S433", base)
    assert sorted(os.listdir(base.parent)) == ["base"]


def test_killed_when_it_has_appeared(base: Path) -> None:
    """What was replaced lies aside then, and is not taken for the work of the run that replaced it."""
    before, whole = files(run(base, "out", "train norm")), files(run(base, "whole"))
    child = os.fork()
    if not child:
        put = staging._put

        def put_and_die(*args: Any) -> None:
            put(*args)
            os.kill(os.getpid(), signal.SIGKILL)

        staging._put = put_and_die
        try:
            run(base, "out", force=True)
        finally:
            os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert files(base.parent / "out") == whole != before
    assert files(run(base, "out", force=True)) == whole
    assert sorted(os.listdir(base.parent)) == ["base", "out", "whole"]
