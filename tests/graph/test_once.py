"""What layers share is computed once in a pass: same numbers and gradients, in every way that a model is run."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery
from surgery.graph import once
from surgery.graph.hooks import drop
from tests import zoo

PROGRAM = "prefix 5 via mlp 7 on all layers"


class Counted:
    """torch.nn.functional as `once` sees it, counting its products."""

    def __init__(self) -> None:
        self.calls = 0

    def linear(self, *args: Any) -> Tensor:
        self.calls += 1
        return F.linear(*args)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    counter = Counted()
    monkeypatch.setattr(once, "F", counter)
    yield counter
    assert not getattr(once._HELD, "values", {}), "a pass was left open"


def transformed(family: str = "llama", program: str = PROGRAM) -> nn.Module:
    return surgery.apply(surgery.parse(program), zoo.tiny(family, dtype=torch.float64))


def gradients(model: nn.Module, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    run().backward()
    return {name: tensor.grad.clone() for name, tensor in surgery.parameters(model).items()}  # type: ignore[union-attr]


def loss(model: nn.Module) -> Tensor:
    result: Tensor = model(**zoo.inputs(model))[0]
    return result.square().sum()


def apart(model: nn.Module) -> nn.Module:
    """The same model, in which each layer computes for itself."""
    other = copy.deepcopy(model)
    drop(other, lambda hook: isinstance(hook, once.Opens))
    return other


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(bool(tensor.any()) for name, tensor in one.items())
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_once_for_all_layers(family: str, counted: Counted) -> None:
    """One product a pass, not one a layer (encoder and decoder of T5 are one statement); logits the same to the bit."""
    model = transformed(family)
    alone = apart(model)
    counted.calls = 0
    got = zoo.logits(model, zoo.inputs(model))
    assert counted.calls == 1
    assert torch.equal(got, zoo.logits(alone, zoo.inputs(model)))
    assert counted.calls > 2
    equal(gradients(model, lambda: loss(model)), gradients(alone, lambda: loss(alone)))


def test_passes_are_their_own(counted: Counted) -> None:
    """Two passes before two backward passes, and a change of the parameters, past every counter, between them."""
    model = transformed()
    first, second = loss(model), loss(model)
    first.backward()
    second.backward()
    before = loss(model).item()
    for tensor in surgery.parameters(model).values():
        tensor.data.add_(0.1)
    assert loss(model).item() != before


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpoints(reentrant: bool, counted: Counted) -> None:
    model = transformed()
    plain = gradients(model, lambda: loss(model))
    model.train()
    model.enable_input_require_grads()  # type: ignore[operator]
    model.activation_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
    counted.calls = 0
    equal(gradients(model, lambda: loss(model)), plain)
    assert counted.calls > 3  # again, in the backward pass


def test_saved_tensors_elsewhere(counted: Counted) -> None:
    model = transformed()
    plain = gradients(model, lambda: loss(model))
    with torch.autograd.graph.save_on_cpu():
        equal(gradients(model, lambda: loss(model)), plain)
    checkpointed = torch.utils.checkpoint.checkpoint  # type: ignore[attr-defined]
    equal(gradients(model, lambda: checkpointed(loss, model, use_reentrant=False)), plain)


def test_a_pass_that_fails_ends(counted: Counted) -> None:
    model = transformed()
    last = next(module for name, module in model.named_modules() if name.endswith("layers.2"))

    def fail(module: nn.Module, args: Any) -> None:
        raise RuntimeError("in the middle")

    handle = last.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        loss(model)
    assert not once._HELD.values
    handle.remove()
    loss(model).backward()


def test_an_interrupted_pass_leaves_nothing_that_is_used() -> None:
    """Torch runs no hooks after Ctrl-C: what is left is of parameters as they were, and the next pass begins anew."""
    model = transformed()
    last = next(module for name, module in model.named_modules() if name.endswith("layers.2"))

    def stop(module: nn.Module, args: Any) -> None:
        raise KeyboardInterrupt

    handle = last.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        loss(model)
    handle.remove()
    with torch.no_grad():
        for tensor in surgery.parameters(model).values():
            tensor.add_(0.1)
    alone = apart(model)
    assert torch.equal(loss(model), loss(alone))
    loss(model).backward()
    assert not once._HELD.values


def test_threads_do_not_meet(counted: Counted) -> None:
    """Each with a graph of its own, which the other's backward pass does not free."""
    model = transformed()
    plain, found = loss(model).item(), []

    def work() -> None:
        for _ in range(5):
            value = loss(model)
            torch.autograd.grad(value, list(surgery.parameters(model).values()))
            found.append(value.item())

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [plain] * 15


def test_copies_and_merges(counted: Counted) -> None:
    """A copy shares within itself; what a merge folds leaves no hook; what is taken out again brings it back."""
    model = transformed()
    other = copy.deepcopy(model)
    counted.calls = 0
    loss(other)
    assert counted.calls == 1
    hooks = [hook for module in other.modules() for hook in module._forward_pre_hooks.values()]
    (opens,) = (hook for hook in hooks if type(hook) is once.Opens)
    assert any(opens.holder is module for module in other.modules())
    surgery.merge(other, keep=True)
    assert not any(isinstance(h, once.Opens) for m in other.modules() for h in m._forward_pre_hooks.values())
    surgery.unmerge(other)
    counted.calls = 0
    loss(other)
    assert counted.calls == 1


def test_a_loaded_model_shares_too(counted: Counted, tmp_path: Path) -> None:
    model = transformed()
    surgery.save(model, tmp_path / "out")
    loaded = surgery.load(tmp_path / "out")
    counted.calls = 0
    wanted = gradients(model, lambda: loss(model))
    assert counted.calls == 1
    got = gradients(loaded, lambda: loss(loaded))
    assert counted.calls == 2
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_compiles_in_one_graph() -> None:
    model = transformed(program=f"{PROGRAM}; lora rank 2 on attn.q")
    inputs = zoo.inputs(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).logits, zoo.logits(model, inputs))
