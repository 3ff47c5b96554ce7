"""An apply or a merge is done whole or not at all: what stops it leaves the model as it was."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.compiler import record_of
from surgery.errors import GraphError, SurgeryError
from surgery.graph.draft import Draft
from surgery.graph.module import Rewritten
from surgery.verify.bounds import relative_error
from tests import zoo
from tests.trained import trained_under


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_apply_leaves_the_model_as_it_was(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Error: until everything is ready nothing is replaced, whatever stops it."""
    model = zoo.tiny("llama")
    fed = zoo.inputs(model)
    before, wants = state(model), {name: p.requires_grad for name, p in model.named_parameters()}
    wanted, places = zoo.logits(model, fed), dict(model.named_modules())
    finish, calls = Draft.finish, []

    def interrupted(self: Draft) -> Rewritten:
        calls.append(self.path)
        if len(calls) == 3:
            raise error("stopped")
        return finish(self)

    program = surgery.parse("prune magnitude 50% on ffn\nquantize ffn nf4\nlora rank 2 on attn.q")
    with monkeypatch.context() as patched:
        patched.setattr(Draft, "finish", interrupted)
        with pytest.raises(error):
            surgery.apply(program, model)
    assert len(calls) == 3
    assert dict(model.named_modules()) == places
    assert torch.equal(zoo.logits(model, fed), wanted)
    after = state(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wants
    assert record_of(model) is None
    surgery.apply(program, model)
    assert sum(isinstance(each, Rewritten) for each in model.modules()) == 12


def test_a_statement_that_fails_half_way_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Error: weights that a statement changes (the residual of PiSSA, zeros) are changed at the very end."""
    from surgery.operations.lora import Lora

    model = zoo.tiny("llama")
    before, fill, calls = state(model), Lora.fill, []

    def failing(self: Lora, sites: Any, context: Any) -> None:
        calls.append(sites)
        if len(calls) == 3:
            raise RuntimeError("stopped")
        fill(self, sites, context)

    with monkeypatch.context() as patched:
        patched.setattr(Lora, "fill", failing)
        with pytest.raises(RuntimeError, match="stopped"):
            surgery.apply(surgery.parse("prune magnitude 50% on ffn\nlora rank 2 init pissa on attn.q"), model)
    after = state(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(isinstance(each, Rewritten) for each in model.modules())


def test_a_model_is_not_left_with_half_a_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Error: when a fold stops with an error the model computes what it did, and can be merged later."""
    merging = sys.modules["surgery.compiler.merge"]  # the package has the function under that name
    model = trained_under("lora rank 2 on attn.q,v", zoo.tiny("llama"))
    fed = zoo.inputs(model)
    wanted, fold, calls = zoo.logits(model, fed), merging.fold_some, []

    def failing(path: str, *rest: Any, **options: Any) -> nn.Module:
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fold(path, *rest, **options)

    with monkeypatch.context() as patched:
        patched.setattr(merging, "fold_some", failing)
        with pytest.raises((KeyboardInterrupt, SurgeryError)):
            surgery.merge(model)
    assert len(calls) == 3
    assert relative_error(zoo.logits(model, fed), wanted) <= 1e-5
    surgery.merge(model)
    assert relative_error(zoo.logits(model, fed), wanted) <= 1e-5
    assert not any(isinstance(each, Rewritten) for each in model.modules())


def test_a_merge_refuses_to_lose_what_is_switched_off() -> None:
    """Error: what is off would be neither merged nor kept; it is named, and nothing is done until all are on."""
    model = trained_under("lora rank 2 on attn.q as one\nlora rank 3 on attn.q,v as two", zoo.tiny("llama"))
    fed = zoo.inputs(model)
    both = zoo.logits(model, fed)
    surgery.activate(model, "one")
    one, tensors = zoo.logits(model, fed), state(model)
    with pytest.raises(GraphError) as caught:
        surgery.merge(model)
    assert {each.code for each in caught.value.diagnostics} == {"S312"}
    assert "two" in str(caught.value)
    with surgery.disabled(model), pytest.raises(GraphError) as caught:
        surgery.merge(model)
    assert {each.code for each in caught.value.diagnostics} == {"S312"}
    assert torch.equal(zoo.logits(model, fed), one)
    after = state(model)
    assert after.keys() == tensors.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in tensors.items())
    assert record_of(model) is not None
    surgery.activate(model)
    assert torch.equal(zoo.logits(model, fed), both)
    surgery.merge(model)
    assert relative_error(zoo.logits(model, fed), both) <= 1e-5
    assert relative_error(one, both) > 1e-4
    assert not surgery.parameters(model)
