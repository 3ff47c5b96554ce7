"""8-bit weights under the names and with the config that transformers and bitsandbytes read (LLM.int8)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from surgery.checkpoint.fourbit import Packing, config
from surgery.graph.codes import dequantize_8bit
from surgery.graph.module import rewritten

if TYPE_CHECKING:
    from torch import nn

ROW_MAJOR = 0  # `weight_format`: the codes lie as (out, in)


def layout(model: nn.Module) -> Packing:
    """How the model's 8-bit weights are written: `P.weight` int8, `P.SCB` each row's magnitude, `P.weight_format`."""
    keys: dict[str, str] = {}
    packed = set()
    for path, module in rewritten(model):
        for node in module.full.nodes:
            if node.target is dequantize_8bit:
                packed.add(path)
                codes, absmax = (str(each.target) for each in node.args[:2])
                keys |= {f"{path}.{codes}": f"{path}.weight", f"{path}.{absmax}": f"{path}.SCB"}
    if not packed:
        return Packing()
    maps = {f"{path}.weight_format": torch.tensor(ROW_MAJOR, dtype=torch.uint8) for path in packed}
    return Packing(keys, maps, {}, config(model, packed, {"load_in_8bit": True}))
