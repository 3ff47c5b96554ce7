"""The largest header that is read, and whatever claims to be one, takes less than 200 MB of memory, all told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from surgery.checkpoint.header import INDEX, LONGEST_HEADER, TENSORS

MEMORY = 200  # MB, of a process that does nothing else
ROOM = LONGEST_HEADER - 200
READ = r"""
import re, sys
from pathlib import Path
from surgery.checkpoint.header import check_checkpoint
from surgery.errors import CheckpointError
try:
    (header,) = check_checkpoint(Path(sys.argv[1]))
    print(len(header.tensors), header.tensors[-1].stop, end=" ")
except CheckpointError as error:
    print(error.diagnostics[0].code, len(str(error)), end=" ")
print(int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1000)
"""


def read(directory: Path) -> tuple[str, int, float]:
    """What came of it: the code of an error or a count, a number that goes with it, and the most memory in MB."""
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", READ, str(directory)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    found, number, memory = done.stdout.split()
    return found, int(number), float(memory)


def test_the_largest_header_is_read(tmp_path: Path) -> None:
    count = TENSORS - 1
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for index in range(count - 1):
        name = f"model.layers.{index:06}.mlp.down_proj.weight"
        header[name] = {"dtype": "U8", "shape": [1, 1], "data_offsets": [index, index + 1]}
    text = json.dumps(header, separators=(",", ":")).encode()
    assert 0.8 * LONGEST_HEADER < len(text) < LONGEST_HEADER
    text += b" " * (LONGEST_HEADER - len(text))
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(count - 1))
    found, stop, memory = read(tmp_path)
    assert (found, stop) == (str(count - 1), 8 + len(text) + count - 1)
    assert 20 < memory < MEMORY


pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell")

HOSTILE = {
    "lists": b'{"a":[' + b"[]," * (ROOM // 3) + b"[]]}",
    "maps": b'{"a":[' + b"{}," * (ROOM // 3) + b"{}]}",
    "numbers": b'{"a":{"dtype":"U8","data_offsets":[0,0],"shape":[' + b"1," * (ROOM // 2) + b"0]}}",
    "floats": b'{"a":[' + b"1.5," * (ROOM // 4) + b"1]}",
    "names": b"{" + b",".join(b'"%x":1' % index for index in range(ROOM // 11)) + b"}",
    "tensors": b"{" + b",".join(
        b'"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % index for index in range(ROOM // 57)
    ) + b"}",
    "depth": b'{"a":' + b"[" * ROOM + b"}",
    "string": b'{"a":"' + b"\xc3\xa9" * (ROOM // 2) + b'"}',
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("index", [False, True], ids=["header", "index"])
def test_what_only_claims_to_be_one_is_refused(kind: str, index: bool, tmp_path: Path) -> None:
    text = HOSTILE[kind]
    assert 0.9 * ROOM < len(text) < LONGEST_HEADER
    if index:
        (tmp_path / INDEX).write_bytes(text[:-1] + b',"weight_map":{"a":"../a.safetensors"}}')
    else:
        (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    code, length, memory = read(tmp_path)
    assert code == ("S414" if index else "S412")
    assert length < 2000
    assert memory < MEMORY
