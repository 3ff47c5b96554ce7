"""Runs that are killed at random moments: what is there stays whole, and the next run ends with the same bytes.

    python -m tests.bench.kills [--kills 200] [--seed 0]

Every other run replaces a directory, every third one merges. A process that is killed is followed by others, killed
as well or not, until one is done; its bytes are compared with those of a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import surgery
from surgery.checkpoint import work
from surgery.checkpoint.merging import merged_shapes, stream_merge
from surgery.checkpoint.models import load_meta
from surgery.checkpoint.streaming import stream
from tests import zoo

PROGRAM = "prune magnitude 50% on ffn; lora rank 4 on attn"


def contents(directory: Path) -> dict[str, bytes]:
    """Every file."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def forked(run: Callable[[], object], after: float | None = None) -> bool:
    """Run in another process, killed after so many seconds; whether it was done before."""
    child = os.fork()
    if not child:
        work.PAUSE = 0.02
        try:
            run()
        finally:
            os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return not os.WIFSIGNALED(os.waitpid(child, 0)[1])


def main(arguments: list[str] | None = None) -> bool:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    chance = random.Random(options.seed)
    place = Path(tempfile.mkdtemp(prefix="kills."))
    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 8, "head_dim": 24, "vocab_size": 512}
    zoo.tiny("llama", dtype=torch.bfloat16, **sizes).save_pretrained(place / "base", max_shard_size="500KB")

    def apply(out: Path) -> None:
        plan = surgery.plan(surgery.parse(PROGRAM), load_meta(str(place / "base")).model)
        stream(plan, place / "base", out, origin=str(place / "base"), force=True)

    def merge(out: Path) -> None:
        shapes = merged_shapes(place / "adapted")
        assert shapes is not None
        stream_merge(place / "adapted", shapes, out, force=True)

    kills = torn = different = finished = 0
    runs = {}
    apply(place / "adapted")
    for run, name in ((apply, "applied"), (merge, "merged")):
        start = time.perf_counter()
        forked(partial(run, place / name))
        runs[run] = (contents(place / name), time.perf_counter() - start)
    before = {"config.json": b"{}"}
    while kills < options.kills:
        run = merge if finished % 3 == 2 else apply
        whole, seconds = runs[run]
        out = place / "out"
        shutil.rmtree(out, ignore_errors=True)
        if finished % 2:
            out.mkdir()
            (out / "config.json").write_bytes(before["config.json"])
        for _ in range(chance.randint(1, 4)):
            if forked(partial(run, out), chance.uniform(0, 1.1 * seconds)):
                break
            kills += 1
            there = contents(out) if out.exists() else None
            torn += there not in (whole, before if finished % 2 else None)
            if there == whole:
                break
        forked(partial(run, out))
        different += contents(out) != whole
        finished += 1
    left = sorted(path.name for path in place.iterdir() if path.name.endswith(".partial"))
    shutil.rmtree(place)
    print(
        f"{kills} runs killed, {torn} left a torn directory; {finished} resumed, {different} with other bytes; {left}"
    )
    return not torn and not different and not left


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
