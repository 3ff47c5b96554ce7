"""An adapter on q and v of a fused projection leaves every k row alone, to the bit, also after a merge."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import surgery
from tests import zoo

FUSED = {"gpt2": "c_attn", "phi3": "qkv_proj", "gpt_neox": "query_key_value"}


def key_rows(family: str, model: torch.nn.Module) -> Tensor:
    """Rows of the fused projection that make the keys, known from reading each model's code."""
    config = model.config
    if family == "gpt2":  # q, k, v after one another
        return torch.arange(config.n_embd, 2 * config.n_embd)
    if family == "phi3":  # all query heads, then fewer key heads, then value heads
        each = config.hidden_size // config.num_attention_heads
        queries = config.num_attention_heads * each
        return torch.arange(queries, queries + config.num_key_value_heads * each)
    each = config.hidden_size // config.num_attention_heads  # GPT-NeoX: q, k, v of the first head, of the second, ...
    return torch.cat([torch.arange((3 * h + 1) * each, (3 * h + 2) * each) for h in range(config.num_attention_heads)])


def fused(family: str, model: torch.nn.Module) -> dict[str, Tensor]:
    """Weight, (out, in), and bias of each fused projection, by path."""
    found = {}
    for path, module in model.named_modules():
        if path.endswith(FUSED[family]):
            weight = module.weight.t() if family == "gpt2" else module.weight
            found[f"{path}.weight"] = weight.detach().clone()
            if getattr(module, "bias", None) is not None:
                found[f"{path}.bias"] = module.bias.detach().clone()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", ["", " dora", " scale rs"])
@pytest.mark.parametrize("family", FUSED)
def test_key_rows_stay_when_q_and_v_are_adapted_and_merged(family: str, options: str, dtype: torch.dtype) -> None:
    model = zoo.tiny(family, dtype=dtype)
    before, keys = fused(family, model), key_rows(family, model)
    surgery.apply(surgery.parse(f"lora rank 3{options} on attn.q,v"), model)
    with torch.no_grad():
        for name, parameter in surgery.parameters(model).items():
            parameter.copy_(torch.randn(parameter.shape, generator=zoo.seeded(0, name)))
    after = fused(family, surgery.merge(model))
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor[keys], before[name][keys]), name
        others = torch.ones(len(tensor), dtype=torch.bool)
        others[keys] = False
        if name.endswith("weight"):
            assert (tensor[others] != before[name][others]).any(dim=1).all(), f"{name}: a q or v row is as before"


@pytest.mark.parametrize("family", FUSED)
def test_keys_stay_in_the_unmerged_forward_too(family: str) -> None:
    model = zoo.tiny(family)
    paths = [path for path, _ in model.named_modules() if path.endswith(FUSED[family])]
    width = model.config.hidden_size
    x = torch.randn(4, width, generator=zoo.seeded(0, "x"))
    before = {path: model.get_submodule(path)(x) for path in paths}
    keys = key_rows(family, model)
    surgery.apply(surgery.parse("lora rank 3 on attn.q,v"), model)
    with torch.no_grad():
        for name, parameter in surgery.parameters(model).items():
            parameter.copy_(torch.randn(parameter.shape, generator=zoo.seeded(0, name)))
    for path in paths:
        after = model.get_submodule(path)(x)
        assert torch.equal(after[:, keys], before[path][:, keys])
        assert not torch.equal(after, before[path])
