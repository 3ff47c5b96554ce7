"""4-bit weights under the names and with the config that transformers and bitsandbytes read by themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from surgery.graph.codes import dequantize_4bit
from surgery.graph.module import Rewritten, rewritten

if TYPE_CHECKING:
    from torch import Tensor, fx, nn

# Our buffers beside a weight -> what stands behind the weight's name in a file.
SUFFIXES = {"absmax": "absmax", "nested_absmax": "nested_absmax", "nested_map": "nested_quant_map"}


@dataclass(frozen=True)
class Packing:
    """What differs in model.safetensors and config.json where weights are kept as codes; empty where none are.

    keys: name in the model -> name in the file. maps, states: tensors that only other readers want.
    config: `quantization_config`, None where nothing is quantized.
    """

    keys: Mapping[str, str] = field(default_factory=dict)
    maps: Mapping[str, Tensor] = field(default_factory=dict)
    states: Mapping[str, State] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None

    @property
    def extras(self) -> tuple[str, ...]:
        """Names in the file that nothing in the model has."""
        return (*self.maps, *self.states)


@dataclass(frozen=True)
class State:
    """bitsandbytes' JSON of one weight. offset: name in the model of the number that ends it, None where none does."""

    said: Mapping[str, Any]
    offset: str | None

    def text(self, offset: float | None = None) -> bytes:
        """As it stands in a file. offset: the number."""
        return json.dumps({**self.said, **({} if self.offset is None else {"nested_offset": offset})}).encode()

    @property
    def longest(self) -> int:
        """The most bytes that the text may have."""
        return len(self.text(-2.2250738585072014e-308))


def layout(model: nn.Module) -> Packing:
    """How the model's 4-bit weights are written."""
    keys: dict[str, str] = {}
    maps: dict[str, Tensor] = {}
    states: dict[str, State] = {}
    first: tuple[Any, ...] | None = None
    packed = set()
    for path, name, node in _quantized(model):
        module = model.get_submodule(path)
        assert isinstance(module, Rewritten)
        name = name.removesuffix("_codes")
        weight = f"{path}.{name}"
        packed.add(path)
        keys[f"{weight}_codes"] = weight
        state: Any = node.args[5:9]
        format, block, shape, dtype = state
        keys |= {
            f"{weight}_{ours}": f"{weight}.{theirs}"
            for ours, theirs in SUFFIXES.items()
            if _has(module, f"{name}_{ours}")
        }
        double = _has(module, f"{name}_nested_absmax")
        said = {"quant_type": format, "blocksize": block, "dtype": _name(dtype), "shape": list(shape)}
        if double:
            said |= {"nested_blocksize": 256, "nested_dtype": "float32"}
        offset = f"{weight}_offset" if double else None
        states[f"{weight}.quant_state.bitsandbytes__{format}"] = State(said, offset)
        maps[f"{weight}.quant_map"] = _codes(str(format))
        first = first or (format, double, dtype)
    if first is None:
        return Packing()
    form, double, dtype = first
    said = {"bnb_4bit_quant_type": form, "bnb_4bit_use_double_quant": double, "bnb_4bit_compute_dtype": _name(dtype)}
    return Packing(keys, maps, states, config(model, packed, {"load_in_4bit": True, **said}))


def _quantized(model: nn.Module) -> Iterator[tuple[str, str, fx.Node]]:
    """Path, parameter and dequantizing node of every 4-bit weight."""
    for path, module in rewritten(model):
        for node in module.full.nodes:
            if node.target is dequantize_4bit:
                yield path, str(node.args[0].target), node


def _has(module: nn.Module, name: str) -> bool:
    return name in module._buffers


def _codes(format: str) -> Tensor:
    from bitsandbytes.functional import get_4bit_type

    codes: Tensor = get_4bit_type(format, device="cpu")
    return codes


def config(model: nn.Module, packed: set[str], said: Mapping[str, Any]) -> dict[str, Any]:
    """`quantization_config` of bitsandbytes. packed: paths of what is in codes. said: what is not at its default."""
    kinds = (torch.nn.Linear, *_conv1d())
    wide = [
        path
        for path, module in model.named_modules()
        if path not in packed and isinstance(getattr(module, "original", module), kinds)
    ]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": False,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": wide,
        "llm_int8_threshold": 6.0,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        **said,
    }


def _conv1d() -> tuple[type, ...]:
    import sys

    found = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return (found,) if found is not None else ()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
