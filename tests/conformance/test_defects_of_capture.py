"""Defects that peers are known for: of what is found in a model, and of what is made of it (6 to 8, 13, 15, 17)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import surgery
from surgery.verify.bounds import merge_bound, relative_error
from tests import zoo
from tests.conformance.defects import trained


class Shifted(nn.Linear):
    """A subclass of `nn.Linear` that computes something else: peers wrap it silently and merge it wrongly."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 2 * self.weight, self.bias) + 1


class Choosy(nn.Linear):
    """One whose forward decides by numbers: no graph can stand for it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.mean() > 0 else super().forward(-x)


def with_lifts(kind: type[nn.Linear]) -> Any:
    """A plain model whose second feed-forward map is of a class of its own."""
    model = zoo.plain("byhand", dtype=torch.float32)
    old = model.blocks[1].lift
    model.blocks[1].lift = kind(old.in_features, old.out_features)
    zoo.fill(model, 0)
    return model


def test_defect_06_a_subclass_of_linear_is_captured_as_it_computes_or_refused() -> None:
    example = (zoo.tokens(51),)
    model = trained(with_lifts(Shifted), "lora rank 2 on ffn.up", size=1.0, example=example)
    adapted = model(*example)
    assert relative_error(adapted, with_lifts(Shifted)(*example)) > 1e-2
    merged = surgery.merge(model)
    assert type(merged.blocks[1].lift) is Shifted
    assert relative_error(merged(*example), adapted) < merge_bound(torch.float32, 4, 1.0)
    with pytest.raises(surgery.SurgeryError) as refused:
        surgery.plan(surgery.parse("lora rank 2 on all linear"), with_lifts(Choosy), example_inputs=example)
    assert "blocks.1.lift" in str(refused.value) or "Choosy" in str(refused.value)


def test_defect_06_is_a_peers() -> None:
    """PEFT adds the branch beside the map, and merges it into a weight that is then doubled."""
    from peft import LoraConfig, inject_adapter_in_model

    example = (zoo.tokens(51),)
    configuration = LoraConfig(r=2, target_modules=["blocks.1.lift"])
    peer: Any = inject_adapter_in_model(configuration, with_lifts(Shifted)).eval()
    layer = peer.blocks[1].lift
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
        adapted = peer(*example)
        layer.merge()
        assert relative_error(peer(*example), adapted) > 1e-3


def test_defect_07_all_linear_takes_the_stacked_weights_of_experts() -> None:
    model = trained(zoo.tiny("mixtral"), "lora rank 2 on all linear")
    stacks = {"gate_up_proj", "down_proj"}
    adapted = {(path, stack) for path in surgery.parameters(model) for stack in stacks if path.endswith(f"_A_{stack}")}
    assert len(adapted) == 2 * len(model.model.layers)
    assert not [name for name in surgery.parameters(model) if "mlp.gate" in name], "a router is no part of it"
    with pytest.raises(surgery.SurgeryError) as caught:
        surgery.plan(surgery.parse("lora rank 2 on attn.q + mixer.in"), zoo.tiny("mixtral"))
    assert "no mixer.in" in str(caught.value), "what matches nothing is told though the rest matches"
    plan = surgery.plan(surgery.parse("quantize base nf4"), zoo.tiny("mixtral"))
    assert any("experts" in warning for warning in plan.warnings), "a verb that passes experts by says so"


@pytest.mark.parametrize("family", ["phi3", "gpt_neox", "gpt2"])
def test_defect_08_q_and_v_of_a_fused_projection_have_adapters_of_their_own(family: str) -> None:
    """Grouped-query rows in phi3, rows that take turns by head in gpt_neox, columns in gpt2; k keeps its bits."""
    base, model = zoo.tiny(family), trained(zoo.tiny(family), "lora rank 2 alpha 3 on attn.q,v")
    added = {name: tensor.detach().clone() for name, tensor in surgery.parameters(model).items()}
    merged = surgery.merge(model)
    checked = 0
    for part in (each for each in surgery.study(base).parts if each.role in ("attn.q", "attn.k", "attn.v")):
        old, new = (each.get_submodule(part.path).weight.detach() for each in (base, merged))
        old, new = (old.t(), new.t()) if part.transposed else (old, new)
        rows = torch.cat([torch.arange(start, stop) for start, stop in part.channels or ()])
        assert 0 < len(rows) < old.shape[0]
        if part.role == "attn.k":
            assert torch.equal(new[rows], old[rows])
            continue
        a, b = (added[f"{part.path}.lora_{letter}_{part.name}"] for letter in "AB")
        assert relative_error(new[rows] - old[rows], 1.5 * b @ a) < 1e-5
        checked += 1
    assert checked == 2 * 3


@pytest.mark.parametrize("init", ["kaiming", "normal", "xavier", "orthogonal", "pissa"])
def test_defect_13_forwards_and_inits_leave_the_base_as_it_is(init: str) -> None:
    """No forward writes to a tensor, on or off; an init that does change the base says so and can be taken back."""
    base, model = zoo.tiny("qwen2"), zoo.tiny("qwen2")
    plan = surgery.plan(surgery.parse(f"lora rank 2 init {init} on attn.q + ffn.down"), model)
    surgery.apply(plan, model)
    fed = zoo.inputs(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for train in (True, False):
        model.train(train)(**fed)
        with surgery.disabled(model):
            model(**fed)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    moved = [name for name, tensor in base.state_dict().items() if not torch.equal(before[name], tensor)]
    assert bool(moved) == (init == "pissa") == any("switched off" in warning for warning in plan.warnings)
    merged = surgery.merge(model).state_dict()
    for name, tensor in base.state_dict().items():
        assert relative_error(merged[name], tensor) < 1e-6, f"{name} did not come back"


@pytest.mark.parametrize("other", ["prune magnitude 50% on ffn", "quantize base nf4", "quantize base int8"])
def test_defect_15_a_transformed_model_can_be_traced_and_keeps_its_keys(other: str) -> None:
    model = zoo.plain("nano", dtype=torch.float32)
    ids = zoo.tokens(51)
    keys = set(model.state_dict())
    program = f"lora rank 2 on attn.q,v + ffn; {other}"
    block = trained(model, program, example=(ids,)).blocks[1]
    assert keys <= set(model.state_dict())
    assert not [name for name in model.state_dict() if "base_layer" in name or "base_model" in name]
    traced = fx.symbolic_trace(block.narrow)
    x = torch.randn(2, 3, 44)
    assert relative_error(traced(x), block.narrow(x)) < 1e-6
    with surgery.disabled(model):
        assert relative_error(traced(x), block.narrow(x)) > 1e-2
    assert relative_error(torch.export.export(model, (ids,)).module()(ids), model(ids)) < 1e-6


class Zorp(nn.Module):
    """Attention and a gated ffn in a class, and under names, that no table has."""

    def __init__(self, width: int = 12, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.alpha, self.beta, self.gamma, self.delta = (nn.Linear(width, width) for _ in range(4))
        self.north, self.south, self.west = nn.Linear(width, 19), nn.Linear(width, 19), nn.Linear(19, width)

    def forward(self, x: Tensor) -> Tensor:
        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(split(self.gamma(x)), split(self.alpha(x)), split(self.delta(x)))
        x = x + self.beta(mixed.transpose(1, 2).flatten(2))
        return x + self.west(F.silu(self.south(x)) * self.north(x))


def test_defect_17_a_model_of_no_known_architecture_is_understood() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 12), Zorp(), nn.Linear(12, 5))
    x = torch.randn(2, 6, 7)
    roles = {
        part.role: part.path for part in surgery.study(model, (x,)).parts if part.role.startswith(("attn.", "ffn."))
    }
    assert roles == {
        "attn.q": "1.gamma",
        "attn.k": "1.alpha",
        "attn.v": "1.delta",
        "attn.o": "1.beta",
        "ffn.gate": "1.south",
        "ffn.up": "1.north",
        "ffn.down": "1.west",
    }
    before = model(x)
    surgery.apply(surgery.parse("lora rank 2 on attn.q,v"), model, example_inputs=(x,))
    assert set(surgery.parameters(model)) == {f"1.{name}.lora_{m}" for name in ("gamma", "delta") for m in "AB"}
    assert torch.equal(model(x), before)
