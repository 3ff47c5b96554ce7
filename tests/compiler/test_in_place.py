"""Weights that code reads in place, past the module that holds them, or written: what would miss that is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DebertaV2Config, DebertaV2ForMaskedLM, RwkvConfig, RwkvForCausalLM

import surgery
from surgery.errors import PlanError


class HeadInPlace(nn.Module):
    """The head is the embedding's weight, multiplied with by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(11, 6), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return (x + self.down(torch.relu(self.up(x)))) @ self.embed.weight.T


class Bare(nn.Module):
    """Two matrices in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.first) @ self.second


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Bare(), Bare()]), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Root(Bare):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + super().forward(x))


class Product(nn.Module):
    """A forward of its own that reads no bias. name: what its matrix is called."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.register_parameter(name, nn.Parameter(torch.randn(6, 8)))

    def forward(self, x: Tensor) -> Tensor:
        return x @ getattr(self, self.name)


class Named(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.up, self.down, self.head = Product(name), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.down(torch.relu(self.up(x))))


IDS, NUMBERS = torch.tensor([[3, 1, 4, 1]]), torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


def deberta() -> nn.Module:
    sizes = {"hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 14, "vocab_size": 50}
    return DebertaV2ForMaskedLM(DebertaV2Config(num_hidden_layers=2, legacy=False, **sizes)).eval()


def rwkv() -> nn.Module:
    """It divides two matrices of every layer by powers of two when it goes from training to evaluation."""
    config = RwkvConfig(hidden_size=12, attention_hidden_size=12, num_hidden_layers=3, vocab_size=50, rescale_every=1)
    return RwkvForCausalLM(config).eval()


@pytest.mark.parametrize("text", ["lora rank 2 on {}", "prune magnitude 50% on {}", "quantize {} nf4", "ia3 on {}"])
@pytest.mark.parametrize(
    ("make", "where", "because", "inputs"),
    [
        (HeadInPlace, "head", "embed and head read `weight`", (IDS,)),
        (deberta, "head", "embed and head read `weight`", None),
        (Blocks, "ffn", "one module reads first and second", (NUMBERS,)),
        (Root, "ffn.up", "the model itself reads `first`", (NUMBERS,)),
        (rwkv, "mixer.out", "the model writes into `weight` as it runs", None),
        (lambda: Named("kernel"), "ffn.up", "its matrix is called `kernel`", (NUMBERS,)),
    ],
)
def test_refused_and_unchanged(make: Any, where: str, because: str, inputs: Any, text: str) -> None:
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(PlanError, match=because) as caught:
        surgery.apply(surgery.parse(text.format(where)), model, example_inputs=inputs)
    assert {each.code for each in caught.value.diagnostics} == {"S101"}
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_merge_would_change_the_head_too() -> None:
    """So the lookup that another part reads past takes no adapter either."""
    with pytest.raises(PlanError, match="embed and head read `weight`, one of them without calling the module"):
        surgery.plan(surgery.parse("lora rank 2 on embed"), HeadInPlace(), example_inputs=(IDS,))


@pytest.mark.parametrize(
    ("make", "text", "inputs"),
    [
        (HeadInPlace, "train head; lora rank 2 on ffn", (IDS,)),
        (Blocks, "train ffn; lora rank 2 on head", (NUMBERS,)),
        (Root, "train ffn.down; lora rank 2 on head", (NUMBERS,)),
    ],
)
def test_the_others_are_free(make: Any, text: str, inputs: Any) -> None:
    """Gradients are asked for by tensor, and maps beside are modules of their own."""
    model = make().eval()
    before = model(*inputs)
    surgery.apply(surgery.parse(text), model, example_inputs=inputs)
    assert torch.equal(model(*inputs), before)
    assert surgery.verify(model)
    for tensor in surgery.parameters(model).values():
        tensor.data.add_(0.3)
    after = model(*inputs)
    assert not torch.equal(after, before)
    torch.testing.assert_close(surgery.merge(model)(*inputs), after)


@pytest.mark.parametrize("quantized", ["", "; quantize ffn nf4"])
def test_a_forward_without_a_bias_is_given_none(quantized: str) -> None:
    """What it would not read is not merged into it; the plan says so, and the output stays."""
    model = Named("weight").eval()
    surgery.apply(surgery.parse(f"train bias add{quantized}"), model, example_inputs=(NUMBERS,))
    for tensor in surgery.parameters(model).values():
        tensor.data.add_(0.3)
    before, found = model(NUMBERS), surgery.verify(model)
    assert found
    assert "cannot merge: it would need a bias" in str(found)
    merged = surgery.merge(model)
    assert torch.equal(merged(NUMBERS), before)
    assert "up.bias" not in merged.state_dict()
