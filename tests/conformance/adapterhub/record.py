"""Writes what AdapterHub's `adapters` computes, for test_adapterhub.py to compare with: it needs an older transformers.

    pip install adapters==1.3.0    # in an environment of its own, with torch
    PYTHONPATH=. python tests/conformance/adapterhub/record.py

Each file holds the tensors of every adapter, `LAYER.attn.down_weight` and so on (decoder layers count on from the
encoder's), and the logits of the tiny model of that family.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests import zoo

PLACES = {"mh_adapter": "attn", "cross_adapter": "cross", "output_adapter": "ffn"}
NAMES = {"adapter_norm_before": "norm", "adapter_down": "down", "adapter_up": "up", "scaling": "scale"}
HOULSBY = {"mh_adapter": True, "output_adapter": True, "original_ln_before": False, "non_linearity": "swish"}
AFTER_FFN = {"mh_adapter": False, "output_adapter": True, "original_ln_before": False, "non_linearity": "relu"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-houlsby": ("bert", HOULSBY),
    "bert-ffn": ("bert", {**AFTER_FFN, "non_linearity": "gelu", "ln_before": True}),
    "bert-parallel": ("bert", {**AFTER_FFN, "is_parallel": True, "scaling": 4.0}),
    "bert-learned": ("bert", {**AFTER_FFN, "is_parallel": True, "scaling": "learned"}),
    "llama-houlsby": ("llama", HOULSBY),
    "llama-ffn": ("llama", {**AFTER_FFN, "scaling": 0.5}),
    "gpt2-houlsby": ("gpt2", {**HOULSBY, "non_linearity": "gelu"}),
    "t5-houlsby": ("t5", HOULSBY),
}


def record(family: str, fields: dict[str, Any]) -> dict[str, Tensor]:
    """The adapters' tensors and the logits."""
    import adapters
    from adapters.methods.bottleneck import BottleneckLayer

    model = zoo.tiny(family)
    adapters.init(model)
    model.add_adapter("peer", config=adapters.BnConfig(**{"reduction_factor": 4, "original_ln_after": True, **fields}))
    model.set_active_adapters("peer")
    model.eval()
    found: dict[str, Tensor] = {}
    for _, layer in model.named_modules():
        if not isinstance(layer, BottleneckLayer) or "peer" not in layer.adapters:
            continue
        place = f"{layer.layer_idx}.{PLACES[layer.location_key]}"
        for name, tensor in layer.adapters["peer"].named_parameters():
            with torch.no_grad():
                draw = torch.randn(tensor.shape, generator=zoo.seeded(1, f"{place}.{name}"))
                tensor.copy_(1 + 0.2 * draw if "scaling" in name else 0.4 * draw)
            part = next(ours for theirs, ours in NAMES.items() if name.startswith(theirs))
            ending = "" if part == "scale" else f"_{name.rpartition('.')[2]}"
            found[f"{place}.{part}{ending}"] = tensor.detach().clone()
    return {**found, "logits": zoo.logits(model, zoo.inputs(model)).clone()}


if __name__ == "__main__":
    from safetensors.torch import save_file

    for case, (family, fields) in CASES.items():
        save_file(record(family, fields), Path(__file__).parent / f"{case}.safetensors")
