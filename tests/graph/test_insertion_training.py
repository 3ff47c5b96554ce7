"""Soft rows are trained as words' embeddings would be: gradients, checkpoints, dropout, narrow dtypes, compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.graph.encoders import (
    DECODING,
    batch,
    build,
    close,
    entrance,
    first,
    lefts,
    prompted,
    with_words,
    without_words,
)


@pytest.mark.parametrize("name", ["bert", "modernbert", "albert", "t5", "bart"])
def test_gradients_reach_the_rows(name: str) -> None:
    """The gradient of the words' embeddings, whatever is padded; the base is frozen."""
    model = build(name, torch.float64)
    fed = batch(model)
    at = entrance(name, model)
    model.requires_grad_(False)
    held: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        held.append(output.detach().requires_grad_())
        return held[-1]

    hook = model.get_submodule(at.lookup).register_forward_hook(keep)
    out = first(model, with_words(fed))
    real = torch.ones(out.shape[:2], dtype=torch.bool)
    if name not in DECODING:
        out, real = without_words(out, fed["attention_mask"]), fed["attention_mask"].bool()
    out[real].square().sum().backward()
    hook.remove()
    assert held[0].grad is not None
    places = [held[0].grad[row, left : left + 3] for row, left in enumerate(lefts(fed["attention_mask"]))]
    want = sum(places)
    prompted(name, model)
    first(model, fed)[real].square().sum().backward()
    assert close(model.soft.weight.grad, want, 1e-8)
    assert want.abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "modernbert", "t5"])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    model = build(name, torch.float64)
    prompted(name, model)
    model.requires_grad_(False)
    model.soft.requires_grad_(True)
    fed = batch(model)
    model.train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.soft.weight.grad = None
        first(model, fed, **({"use_cache": False} if name == "t5" else {})).square().sum().backward()
        found.append(model.soft.weight.grad)
    assert close(found[1], found[0], 1e-10)
    assert found[0].abs().max() > 1e-3


def test_dropout_falls_on_rows_as_on_words() -> None:
    model = build("bert", torch.float64, hidden_dropout_prob=0.3)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    model.train()
    fed = batch(model, "right")
    torch.manual_seed(0)
    want = without_words(first(model, with_words(fed)), fed["attention_mask"])
    prompted("bert", model)
    torch.manual_seed(0)
    assert close(first(model, fed), want, 1e-10)


def test_narrow_dtypes() -> None:
    """float32 rows over a bfloat16 base, and autocast over float32: computed in bfloat16, trained in float32."""
    narrow = build("bert", torch.bfloat16)
    prompted("bert", narrow)
    narrow.soft.float()
    fed = batch(narrow)
    out = first(narrow, fed)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert narrow.soft.weight.grad.dtype == torch.float32
    wide = build("bert")
    prompted("bert", wide)
    want = first(wide, fed)
    with torch.autocast("cpu", torch.bfloat16):
        got = first(wide, fed)
    assert got.dtype == torch.bfloat16
    assert close(got.float(), want, 0.1)
    got.float().square().sum().backward()
    assert wide.soft.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_compiles_as_one_graph(name: str) -> None:
    model = build(name)
    prompted(name, model)
    fed = batch(model)
    want = first(model, fed)
    want.square().sum().backward()
    gradient, model.soft.weight.grad = model.soft.weight.grad, None
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(**fed)[0]
    assert close(got, want, 1e-5)
    got.square().sum().backward()
    assert close(model.soft.weight.grad, gradient, 1e-4)
    torch._dynamo.reset()
