"""Weights that code reads in place, past the module that holds them, or written: what would miss that is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DebertaV2Config, DebertaV2ForMaskedLM, RwkvConfig, RwkvForCausalLM

import surgery
from surgery.errors import GraphError, PlanError
from surgery.graph.module import Rewritten
from tests import zoo


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
FED = (zoo.tokens(51),)


def deberta() -> nn.Module:
    sizes = {"hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 14, "vocab_size": 50}
    return DebertaV2ForMaskedLM(DebertaV2Config(num_hidden_layers=2, legacy=False, **sizes)).eval()


def rwkv() -> nn.Module:
    """It divides two matrices of every layer by powers of two when it goes from training to evaluation."""
    config = RwkvConfig(hidden_size=12, attention_hidden_size=12, num_hidden_layers=3, vocab_size=50, rescale_every=1)
    return RwkvForCausalLM(config).eval()


@pytest.mark.parametrize(
    "text", ["lora rank 2 on {}", "prune magnitude 50% on {}", "quantize {} nf4", "quantize {} int8", "ia3 on {}"]
)
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


@pytest.mark.parametrize("quantized", ["", "; quantize ffn nf4", "; quantize ffn int8"])
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


class Fused(nn.Module):
    """Torch's own encoder layers, whose fast path reads weights without calling the modules that hold them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(51, 20)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(20, 4, 30, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(20, 51)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Attending(nn.Module):
    """nn.MultiheadAttention, which hands the weight of its output projection to a function."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(51, 20)
        self.layers = nn.ModuleList(nn.ModuleDict({"attention": self.one(), "mlp": self.two()}) for _ in range(2))
        self.head = nn.Linear(20, 51)

    @staticmethod
    def one() -> nn.Module:
        return nn.MultiheadAttention(20, 4, batch_first=True)

    @staticmethod
    def two() -> nn.Module:
        return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 20))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer["attention"](x, x, x, need_weights=False)[0]
            x = x + layer["mlp"](x)
        return self.head(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("kind", "program", "code"),
    [
        (Attending, "lora rank 2 on attn.o", "S303"),
        (Attending, "quantize attn.o nf4", "S303"),
        (Fused, "lora rank 2 on attn.o", "S303"),
        (Fused, "lora rank 2 on ffn", "S303"),
        (Fused, "quantize base nf4", "S101"),  # its in_proj_weight is no module's `weight` besides
    ],
)
def test_weights_that_are_read_past_their_module_are_refused(
    kind: type[nn.Module], program: str, code: str, training: bool
) -> None:
    """Error: an adapter at a module that is never called would train to nothing; the model stays as it was."""
    torch.manual_seed(0)
    model = kind().train(training)
    wanted = model(*FED).detach()
    with pytest.raises((GraphError, PlanError)) as caught:
        surgery.apply(surgery.parse(program), model, example_inputs=FED)
    assert {each.code for each in caught.value.diagnostics} == {code}
    assert "layers.0" in str(caught.value)
    assert torch.equal(model(*FED), wanted)
    assert not any(isinstance(each, Rewritten) for each in model.modules())


def test_modules_beside_such_a_weight_are_rewritten() -> None:
    """identity_at_init: the refusal is of that place only."""
    torch.manual_seed(0)
    model = Attending().eval()
    with torch.no_grad():  # torch's attention rounds otherwise where gradients are wanted
        wanted = model(*FED)
        surgery.apply(surgery.parse("lora rank 2 on ffn"), model, example_inputs=FED)
        assert torch.equal(model(*FED), wanted)
    assert sum(isinstance(each, Rewritten) for each in model.modules()) == 4
