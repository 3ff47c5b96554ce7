"""Several adapters on one model as PEFT has them: mixed batches, and what is made of two of them."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import surgery
from surgery.compiler import mixing
from tests import zoo
from tests.conformance.peers import linear_maps, load_into
from tests.conformance.test_peft import distance

RANKS = {"french": (3, 5.0), "german": (2, 3.0)}
SHARES = {"french": 0.7, "german": 0.45}


def both(family: str, dtype: torch.dtype, dora: bool = False) -> tuple[Any, Any, Any]:
    """PEFT's model with two adapters, ours with the same tensors, and inputs of four rows."""
    from peft import LoraConfig, get_peft_model

    base = zoo.tiny(family, dtype=dtype)
    paths = linear_maps(base)
    conv = type(base.get_submodule(paths[0])).__name__ == "Conv1D"
    peer: Any = copy.deepcopy(base)
    tensors: dict[str, Tensor] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, (rank, alpha) in RANKS.items():
            configuration = LoraConfig(
                r=rank, lora_alpha=alpha, target_modules=paths, use_dora=dora, fan_in_fan_out=conv
            )
            if name == "french":
                peer = get_peft_model(peer, configuration, adapter_name=name)
            else:
                peer.add_adapter(name, configuration)
    for path in paths:
        layer = peer.base_model.model.get_submodule(path)
        for name in RANKS:
            found = {"A": layer.lora_A[name].weight, "B": layer.lora_B[name].weight}
            for which, tensor in found.items():
                draw = torch.randn(tensor.shape, generator=zoo.seeded(0, f"{path}.{name}.{which}"), dtype=torch.float64)
                tensor.data = (0.4 * tensor.shape[-1] ** -0.5 * draw).to(dtype)
                tensors[f"{path}.{name}_lora_{which}"] = tensor.detach().clone()
            if dora:
                tensors[f"{path}.{name}_lora_magnitude"] = layer.lora_magnitude_vector[name].weight.detach().clone()
    lines = [f"lora rank {r} alpha {a}{' dora' if dora else ''} on all linear as {n}" for n, (r, a) in RANKS.items()]
    program = "\n".join(lines)
    ours = surgery.apply(surgery.parse(program), base)
    load_into(ours, tensors)
    return peer.eval(), ours, zoo.inputs(ours, batch=4)


@pytest.mark.parametrize("family", ["gpt2", "qwen2", pytest.param("gpt_neox", marks=pytest.mark.slow)])
def test_a_mixed_batch_is_pefts(family: str) -> None:
    """To 1e-6 of the largest logit in float32, rows of the base among them."""
    peer, ours, fed = both(family, torch.float32)
    rows = ["german", "french", None, "german"]
    with torch.no_grad():
        wanted = peer(**fed, adapter_names=[row or "__base__" for row in rows], use_cache=False).logits
    with surgery.route(ours, rows):
        found = zoo.logits(ours, fed)
    assert distance(found, wanted) <= 1e-6
    surgery.activate(ours, "german")
    assert distance(zoo.logits(ours, fed)[1], wanted[1]) > 0.01


METHODS = {
    "cat": {"method": "linear"},
    "svd": {"method": "svd", "rank": 3},
    "ties_svd": {"method": "ties", "rank": 4, "density": 0.4},
    "dare_linear_svd": {"method": "dare", "rank": 4, "density": 0.6},
}


@pytest.mark.parametrize("combination", METHODS)
@pytest.mark.parametrize("family", ["gpt2", pytest.param("qwen2", marks=pytest.mark.slow)])
def test_a_combination_is_pefts(family: str, combination: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, where both cut off the same singular values; of dare, both drop the same entries."""
    import peft.utils.merge_utils

    peer, ours, fed = both(family, torch.float64)
    drawn: list[tuple[Tensor, Tensor]] = []
    drop = mixing.drop

    def dropped(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
        drawn.append((delta, drop(delta, density, generator)))
        return drawn[-1][1]

    def pruned(tensor: Tensor, density: float, rescale: bool) -> Tensor:
        for turned in (tensor, tensor.t()):
            for delta, kept in drawn:
                if delta.shape == turned.shape and torch.allclose(delta, turned, rtol=1e-6, atol=1e-9):
                    return kept if turned is tensor else kept.t()
        raise AssertionError("PEFT prunes another change")

    monkeypatch.setattr(mixing, "drop", dropped)
    monkeypatch.setattr(peft.utils.merge_utils, "random_pruning", pruned)
    settings = METHODS[combination]
    surgery.combine(ours, SHARES, name="both", **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer.add_weighted_adapter(
            list(SHARES),
            list(SHARES.values()),
            "both",
            combination_type=combination,
            svd_rank=settings.get("rank"),
            density=settings.get("density"),
        )
    peer.set_adapter("both")
    surgery.activate(ours, "both")
    found, wanted = zoo.logits(ours, fed), zoo.logits(peer, fed)
    assert distance(found, wanted) <= 1e-6
    with surgery.disabled(ours):
        assert distance(zoo.logits(ours, fed), wanted) > 0.01


def test_pefts_linear_is_another_thing() -> None:
    """It mixes A with A and B with B, so that its change is not the sum of the changes: a known defect of the peer."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer: Any = get_peft_model(zoo.tiny("qwen2"), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="one")
    peer.add_adapter("two", LoraConfig(r=2, target_modules=["q_proj"]))
    layer: Any = peer.base_model.model.model.layers[0].self_attn.q_proj
    for name in ("one", "two"):
        torch.nn.init.normal_(layer.lora_B[name].weight, generator=zoo.seeded(0, name))
    peer.add_weighted_adapter(["one", "two"], [0.5, 0.5], "mean", combination_type="linear")
    wanted = (layer.get_delta_weight("one") + layer.get_delta_weight("two")) / 2
    assert distance(layer.get_delta_weight("mean"), wanted) > 0.2
