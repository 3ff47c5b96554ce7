"""Write and read tensors as safetensors, one at a time, with a digest of each; memory follows the largest tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from surgery.checkpoint.header import Header, TensorInfo
from surgery.checkpoint.layout import Slot, layout
from surgery.errors import CheckpointError
from surgery.graph.digest import bytes_of, digest

if TYPE_CHECKING:
    from torch import Tensor

NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in NAMES.items()}

Tell = Callable[[int], object]  # told the number of bytes done since the last time


def silent(_: int) -> None:
    """Tell nobody."""


def slot_of(name: str, tensor: Tensor, group: str = "") -> Slot:
    """What is to be known of a tensor to lay out a file. Errors: S420 for a dtype that the format lacks."""
    if tensor.dtype not in NAMES:
        raise CheckpointError.of("S420", f"{name} has dtype {tensor.dtype}, which safetensors cannot hold")
    return Slot(name, NAMES[tensor.dtype], tuple(tensor.shape), group)


def write(path: Path, tensors: Mapping[str, Tensor], tell: Tell = silent) -> dict[str, str]:
    """Write a safetensors file and give the digest of each tensor, by name. Wider dtypes first: data is aligned.

    Errors: S420 for a dtype that the format lacks; OSError as the system raises it.
    """
    file = layout(path.name, [slot_of(name, tensor) for name, tensor in tensors.items()])
    digests: dict[str, str] = {}
    with path.open("wb") as opened:
        opened.write(file.head({}))
        for slot in file.slots:
            data = bytes_of(tensors[slot.name])
            opened.write(data)
            digests[slot.name] = digest(data)
            tell(len(data))
    return digests


def read(header: Header, tell: Tell = silent) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a file with its name, in the order of the file, on the CPU. Error: S412 for an unknown dtype."""
    with header.path.open("rb") as file:
        for info in header.tensors:
            tensor = _empty(header.path, info)
            file.seek(info.start)
            data = bytes_of(tensor)
            if file.readinto(data) != len(data):
                raise CheckpointError.of("S411", f"`{header.path}` is truncated inside {info.name}")
            tell(len(data))
            yield info.name, tensor


def _empty(path: Path, info: TensorInfo) -> Tensor:
    if info.dtype not in DTYPES:
        raise CheckpointError.of("S412", f"`{path}`: {info.name} has dtype {info.dtype}, which is not supported")
    return torch.empty(info.shape, dtype=DTYPES[info.dtype])
