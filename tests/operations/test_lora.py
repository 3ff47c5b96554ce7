"""What low-rank adapters start from, where they refuse, and which numbers they train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery
from surgery.errors import PlanError, SurgeryError
from surgery.graph.module import Rewritten
from surgery.operations.lora import Lora
from tests import zoo
from tests.graph.rewriting import rewrite

FED = (zoo.tokens(51),)


def refused(program: str, model: Any, example: Any = None) -> SurgeryError:
    """The error of a program that does not fit; the model is as it was."""
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(SurgeryError) as caught:
        surgery.apply(surgery.parse(program), model, example_inputs=example)
    after = model.state_dict()
    assert after.keys() == wanted.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in wanted.items())
    assert not any(isinstance(each, Rewritten) for each in model.modules())
    return caught.value


@pytest.mark.parametrize(
    "program",
    [
        "lora rank 2 dora on attn.q as a\nlora rank 2 init pissa on attn.q as b",
        "lora rank 2 init pissa on attn as a\nlora rank 3 dora on attn.q,v as b",
        "lora rank 2 dora on attn.q as a\nlora rank 3 dora on attn.q,k as b",
        "lora rank 2 init pissa on attn.q as a\nlora rank 3 init pissa on attn.q as b",
    ],
)
def test_two_adapters_cannot_both_redefine_a_weight(program: str) -> None:
    """Error: norms taken from a weight that another statement then changes, or twice, are no identity at the start."""
    error = refused(program, zoo.tiny("llama"))
    assert isinstance(error, PlanError)
    assert {each.code for each in error.diagnostics} == {"S103"}
    assert "attn.q" in str(error)
    assert "self_attn.q_proj" in str(error)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_that_redefine_other_rows_stand_beside_each_other(family: str) -> None:
    """identity_at_init: on q and on v, fused or not, and a plain adapter of another name on both."""
    model = zoo.tiny(family)
    fed = zoo.inputs(model)
    wanted = zoo.logits(model, fed)
    surgery.apply(
        surgery.parse("lora rank 2 dora on attn.q as a\nlora rank 2 dora on attn.v as b\nlora rank 2 on attn.k as c"),
        model,
    )
    assert torch.equal(zoo.logits(model, fed), wanted)
    assert len(surgery.parameters(model)) == 3 * (3 + 3 + 2)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 2, self.bias)


def test_pissa_needs_the_weight_itself() -> None:
    """Error: what is left over can only be stored where the product reads the weight as it is stored."""
    model = zoo.plain("byhand", dtype=torch.float32)
    for block in model.blocks:
        block.lift = Doubled(block.lift.in_features, block.lift.out_features)
    error = refused("lora rank 2 init pissa on ffn.up", model, FED)
    assert {each.code for each in error.diagnostics} == {"S304"}
    assert "blocks.0.lift" in str(error)


def test_pissa_leaves_a_tied_head_alone() -> None:
    """Error: the weight less its principal part is no embedding; a plain adapter on the same head is one branch."""
    error = refused("lora rank 2 init pissa on head", zoo.tiny("qwen2"))
    assert {each.code for each in error.diagnostics} == {"S101"}
    assert "embed_tokens" in str(error)
    surgery.plan(surgery.parse("lora rank 2 on head"), zoo.tiny("qwen2"))
    surgery.plan(surgery.parse("lora rank 2 init pissa on head"), zoo.tiny("qwen2", tie_word_embeddings=False))


def rounded_once(found: Tensor, exact: Tensor) -> bool:
    """Within half a step of the exact value everywhere, but for what float32 sums are off."""
    step = torch.finfo(found.dtype).eps * 2.0 ** exact.abs().clamp(min=1e-30).log2().floor()
    return bool(((found.double() - exact).abs() <= 0.5 * step + 1e-6 * exact.abs().max()).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("alpha", [4, 8])
def test_the_residual_of_a_sixteen_bit_weight_is_rounded_once(dtype: torch.dtype, alpha: int) -> None:
    """pissa: the weight that stays is W - s B A, the difference taken in float32."""
    torch.manual_seed(0)
    module = nn.Linear(20, 24, bias=False, dtype=dtype)
    weight = module.weight.detach().clone()
    made = rewrite(module, Lora(rank=4, alpha=alpha, init="pissa"))
    a, b = (made.get_parameter(f"a0_lora_{letter}").detach() for letter in "AB")
    assert a.dtype == b.dtype == torch.float32
    wanted = weight.double() - alpha / 4 * (b.double() @ a.double())
    assert rounded_once(made.get_parameter("weight").detach(), wanted)
    twice = weight - (alpha / 4 * (b @ a)).to(dtype)
    assert not rounded_once(twice, wanted), "the case must tell one rounding from two"


@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_the_residual_in_a_model_is_rounded_once_too(family: str) -> None:
    """pissa: on some rows of a fused 16-bit projection as on a whole one; rows of k keep their bits."""
    base = zoo.tiny(family, dtype=torch.bfloat16)
    model = zoo.tiny(family, dtype=torch.bfloat16)
    plan = surgery.plan(surgery.parse("lora rank 2 init pissa on attn.q,v"), model)
    surgery.apply(plan, model)
    checked = 0
    for part in plan.steps[0].parts:
        old, new = (each.get_submodule(part.path).weight.detach() for each in (base, model))
        old, new = (old.t(), new.t()) if part.transposed else (old, new)
        rows = torch.cat([torch.arange(*run) for run in part.channels or ()])
        site = model.get_submodule(part.path)
        a, b = (site.get_parameter(f"lora_{letter}_{part.name}").detach() for letter in "AB")
        assert rounded_once(new[rows], old[rows].double() - b.double() @ a.double())
        checked += 1
    assert checked == 6
    anatomy = surgery.study(base)
    for part in (each for each in anatomy.parts if each.role == "attn.k"):
        old, new = (each.get_submodule(part.path).weight.detach() for each in (base, model))
        old, new = (old.t(), new.t()) if part.transposed else (old, new)
        rows = torch.cat([torch.arange(*run) for run in part.channels or ()])
        assert torch.equal(new[rows], old[rows])
        assert not torch.equal(new, old)


def test_the_padding_token_is_not_trained() -> None:
    """frame: the row that torch's lookup leaves out of every gradient is left out of the adapter's too."""
    torch.manual_seed(0)
    for padding in (0, 3, -1):
        module = nn.Embedding(11, 9, padding_idx=padding)
        padding %= 11
        made = rewrite(module, Lora(rank=2))
        ids = torch.tensor([[padding, 1, 2], [padding, 5, 1]])
        assert torch.equal(made(ids), module(ids))
        (made(ids) * torch.randn(2, 3, 9)).sum().backward()
        gradient = made.get_parameter("a0_lora_A").grad
        assert gradient is not None
        assert bool((gradient[:, padding] == 0).all())
        assert bool((gradient[:, [1, 2, 5]] != 0).any(0).all())
    plain = rewrite(nn.Embedding(11, 9), Lora(rank=2))
    plain(torch.tensor([0])).sum().backward()
    assert bool((plain.get_parameter("a0_lora_A").grad[:, 0] != 0).any())
