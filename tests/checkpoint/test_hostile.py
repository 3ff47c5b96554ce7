"""Mutated headers and indexes: each refused with one of our errors, in little memory, and nothing is written."""

from __future__ import annotations

import gc
import json
import os
import pickle
import random
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from surgery.checkpoint.header import INDEX, check_checkpoint
from surgery.errors import CheckpointError

ONE, TWO, SINGLE = "model-1.safetensors", "model-2.safetensors", "model.safetensors"
CODES = {"S410", "S411", "S412", "S413", "S414"}
HUGE = (2**31, 2**62, 2**63, 2**64 - 1, 10**30, 10**4000)
ODD = (None, True, "8", 0.5, -1, -(2**63), [], {}, [1, 2], float("nan"))


class Boom:
    """A pickle that runs code when it is opened."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("opened"),)


def sharded(directory: Path) -> Path:
    """Two good shards and their index."""
    directory.mkdir()
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2, dtype=torch.float16)}, directory / ONE)
    save_file({"c": torch.ones(4), "d": torch.ones(5, dtype=torch.int8)}, directory / TWO)
    (directory / INDEX).write_text(
        json.dumps({"metadata": {}, "weight_map": dict(zip("abcd", (ONE, ONE, TWO, TWO), strict=True))})
    )
    return directory


def rewritten(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """A file whose header was changed, its length mended."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def _offsets(draw: random.Random, path: Path, of: Path) -> None:
    """Overlapping, huge, negative, reversed or odd."""

    def change(header: dict[str, Any]) -> None:
        entry = draw.choice([entry for name, entry in header.items() if name != "__metadata__"])
        start, stop = entry["data_offsets"]
        entry["data_offsets"] = draw.choice(
            [
                [start + draw.randint(1, 9), stop], [start, stop + draw.choice([-1, 1, 7, *HUGE])], [stop, start],
                [-start - 1, stop], [start, draw.choice(ODD)], [start], [start, stop, stop], draw.choice(ODD),
                [start + 10**18, stop + 10**18],
            ]
        )  # fmt: skip

    rewritten(of, change)


def _shape(draw: random.Random, path: Path, of: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        entry = draw.choice([entry for name, entry in header.items() if name != "__metadata__"])
        entry["shape"] = draw.choice(
            [[*entry["shape"], draw.choice([*HUGE, 2, 0])], [draw.choice(ODD[:-3])], draw.choice(ODD), [10**18] * 5000]
        )
        if entry["shape"] == []:  # of a scalar, which these are not
            entry["shape"] = [0]

    rewritten(of, change)


def _entry(draw: random.Random, path: Path, of: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        name = draw.choice([name for name in header if name != "__metadata__"])
        key = draw.choice(["dtype", "shape", "data_offsets", None])
        if key is None:
            header[name] = draw.choice(ODD)
        elif draw.random() < 0.5:
            del header[name][key]
        else:
            header[name]["dtype"] = draw.choice([*ODD, "F33", "F64", "\ud800"])

    rewritten(of, change)


def _names(draw: random.Random, path: Path, of: Path) -> None:
    """A tensor twice, under another name, or gone."""
    data = of.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    text = data[8:end].rstrip()
    kind = draw.randrange(3)
    if kind == 0:
        header = json.loads(text)
        name, entry = draw.choice(list(header.items()))
        text = text[:-1] + b"," + json.dumps(name).encode() + b":" + json.dumps(entry).encode() + b"}"
        of.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    else:
        held = [name for name in json.loads(text) if name != "__metadata__"]
        name = draw.choice(held)
        rewritten(
            of,
            lambda header: header.update(
                {f"{name}x": header[name]} if kind == 1 else {"__metadata__": draw.choice([1, [1], {"a": 1}, "x"])}
            ),
        )


def _bytes(draw: random.Random, path: Path, of: Path) -> None:
    """Cut, lengthened, or with another length of its header."""
    data = of.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    length = draw.choice([0, 1, end - 9, end + 1, 2**20, 2**40, 2**63, 2**64 - 1]).to_bytes(8, "little")
    of.write_bytes(
        draw.choice([data[: draw.randrange(len(data))], data + draw.randbytes(draw.randint(1, 50)), length + data[8:]])
    )


def _nonsense(draw: random.Random, path: Path, of: Path) -> None:
    """Text that is no header, some of it deep or long."""
    depth, length = draw.choice([10, 10_000, 200_000]), draw.choice([10, 100_000])
    text = draw.choice(
        [
            b"[" * depth, b'{"a":' * depth, b"{}" + b" " * 9 + b"x", b"[" + b"{}," * length + b"{}]", b"null", b'"a"',
            b'{"a":' + b"9" * length + b"}", b"\xff\xfe" * length, draw.randbytes(draw.randint(1, 300)),
        ]
    )  # fmt: skip
    of.write_bytes(len(text).to_bytes(8, "little") + text + draw.randbytes(3))


def _pickled(draw: random.Random, path: Path, of: Path) -> None:
    of.write_bytes(
        draw.choice([pickle.dumps(Boom(), protocol) for protocol in (2, 3, 4, 5)] + [b"PK\x03\x04" + bytes(60)])
    )


def _index_names(draw: random.Random, path: Path, of: Path) -> None:
    """A shard outside the directory, one that is none, or one that is not there."""
    outside = path.parent / "outside.safetensors"
    shutil.copyfile(of, outside)
    name = draw.choice(
        [
            "../outside.safetensors", str(outside), f"x/../../{outside.name}", "..", ".", "", "/", "x.json",
            "a\\b.safetensors", "gone.safetensors", "\0.safetensors", "\ud800.safetensors", "x" * 5000 + ".safetensors",
            "pytorch_model.bin", "~/x.safetensors", "file:///etc/passwd", INDEX, ONE + "/", *ODD[:-2],
        ]
    )  # fmt: skip
    data = json.loads((path / INDEX).read_text())
    data["weight_map"][draw.choice("abcd")] = name
    if isinstance(name, str) and Path(name) == Path(ONE):
        data["weight_map"]["c"] = TWO + "x"
    (path / INDEX).write_text(json.dumps(data))


def _index_map(draw: random.Random, path: Path, of: Path) -> None:
    """An index that says what the shards do not, or says it twice, or is none."""
    good = json.loads((path / INDEX).read_text())
    swapped = {**good["weight_map"], "a": TWO}
    more = {**good["weight_map"], "e": ONE}
    twice = json.dumps(good).replace('"a":', '"b": "x", "a":')
    (path / INDEX).write_text(
        draw.choice(
            [
                json.dumps({"weight_map": swapped}), json.dumps({"weight_map": more}), twice, "", "[]", "{", "null",
                json.dumps({"weight_map": draw.choice(ODD)}), json.dumps({}), "[" * 200_000, '{"weight_map":' * 9_999,
            ]
        )
    )  # fmt: skip


def _links(draw: random.Random, path: Path, of: Path) -> None:
    """A file that is a link to outside, to itself or to nothing, a directory, or a pipe."""
    victim = draw.choice([of, path / INDEX])
    outside = path.parent / "elsewhere"
    shutil.copyfile(victim, outside)
    victim.unlink()
    kind = draw.randrange(5)
    if kind == 3:
        victim.mkdir()
    elif kind == 4:
        os.mkfifo(victim)
    else:
        victim.symlink_to([outside, victim, path / "nothing"][kind])


def _copied(draw: random.Random, path: Path, of: Path) -> None:
    """The same tensors in both shards."""
    shutil.copyfile(path / ONE, path / TWO)
    data = {"weight_map": dict.fromkeys("ab", draw.choice([ONE, TWO]))}
    data["weight_map"]["a"] = ONE
    data["weight_map"]["b"] = TWO
    (path / INDEX).write_text(json.dumps(data))


MUTATIONS = (
    _offsets, _shape, _entry, _names, _bytes, _nonsense, _pickled, _index_names, _index_map, _links, _copied,
)  # fmt: skip


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    """Every path below a directory with its size and time."""
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in directory.rglob("*")}


def survive(seed: int, good: Path, place: Path) -> str:
    """One mutation, refused with a message; gives its code."""
    draw = random.Random(seed)
    mutate = MUTATIONS[seed % len(MUTATIONS)]
    path = place / "model"
    shutil.copytree(good, path)
    of = path / draw.choice([ONE, TWO])
    if mutate in (_offsets, _shape, _entry, _bytes, _nonsense, _pickled) and draw.random() < 0.5:
        (path / ONE).rename(path / SINGLE)
        (path / INDEX).unlink()
        of = path / SINGLE
    mutate(draw, path, of)
    before = snapshot(place)
    with pytest.raises(CheckpointError) as caught:
        check_checkpoint(path)
    (diagnostic,) = caught.value.diagnostics
    assert str(path) in diagnostic.message
    assert len(str(caught.value)) < 12_000
    assert snapshot(place) == before
    for each in list(place.iterdir()):
        shutil.rmtree(each) if each.is_dir() else each.unlink()
    return diagnostic.code


def all_refused(seeds: range, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    good, place = sharded(tmp_path / "good"), tmp_path / "place"
    place.mkdir()
    assert len(check_checkpoint(good)) == 2
    gc.collect()
    gc.freeze()  # or each collection below goes through all that earlier tests have left
    tracemalloc.start()
    try:
        codes = set()
        peak = 0
        for seed in seeds:
            gc.collect()  # errors that were caught hold what was read, in circles
            tracemalloc.reset_peak()
            codes.add(survive(seed, good, place))
            peak = max(peak, tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()
    assert codes == CODES
    assert peak < 20e6
    assert not (tmp_path / "opened").exists(), "a pickle was opened"


def test_mutations_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    all_refused(range(700), tmp_path, monkeypatch)


@pytest.mark.slow
def test_ten_thousand_mutations_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    all_refused(range(10_000), tmp_path, monkeypatch)
