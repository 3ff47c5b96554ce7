"""Mixtures of experts: the formula with experts that differ, losses, and everything that is done with models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery
from surgery.errors import CheckpointError, GraphError
from surgery.graph.experts import MixtureOfExperts, Routing, mixtures
from surgery.verify.bounds import relative_error
from tests import zoo
from tests.reference_decoder import Shape, reference_decoder
from tests.refusals import assert_refused

PROGRAM = "moe 4 experts top 2 on ffn ; train experts, router"
GATED = ("llama", "qwen2", "gemma", "phi3")
UPCYCLED = (*GATED, "gpt2", "gpt_neox", "t5")
SHAPE = Shape(layers=2, bias=True)
TOKENS = zoo.tokens(SHAPE.vocabulary, 2, 9, 0)


def upcycled(family: str, program: str = PROGRAM, **changes: Any) -> Any:
    return surgery.apply(surgery.parse(program), zoo.tiny(family, **changes))


@torch.no_grad()
def shaken(model: Any) -> Any:
    """The model with experts and routers that differ."""
    for path, module in mixtures(model):
        for name, tensor in module.named_parameters():
            tensor += (
                0.3 * tensor.std() * torch.randn(tensor.shape, generator=zoo.seeded(0, f"{path}.{name}")).to(tensor)
            )
        module.router.weight *= 20
    return model


class Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def mixture(routing: Routing) -> MixtureOfExperts:
    made = MixtureOfExperts(Block(6, 11).double(), 6, routing)
    with torch.no_grad():
        for name, tensor in made.named_parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=zoo.seeded(3, name), dtype=torch.float64))
    return made


def by_hand(made: MixtureOfExperts, x: Tensor) -> Tensor:
    """One token after the other, as the formula reads."""
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        logits = made.router.weight @ token
        best = logits.argsort(descending=True)[: made.routing.top]
        weights = logits[best].exp() / logits[best].exp().sum()
        stacks = dict(made.experts.named_parameters())
        inner = [F.relu(stacks["up.weight"][e] @ token + stacks["up.bias"][e]) for e in best]
        rows.append(sum(w * (stacks["down.weight"][e] @ h) for w, e, h in zip(weights, best, inner, strict=True)))
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize(("experts", "top"), [(5, 2), (5, 1), (3, 3), (1, 1), (7, 4)])
def test_the_mixture_is_its_formula(experts: int, top: int) -> None:
    made = mixture(Routing(experts, top))
    x = torch.randn(2, 7, 6, generator=zoo.seeded(0, "x"), dtype=torch.float64, requires_grad=True)
    found, wanted = made(x), by_hand(made, x)
    assert relative_error(found, wanted) < 1e-13
    tensors = [x, *made.parameters()]
    mine = torch.autograd.grad(found.square().sum(), tensors, allow_unused=True, materialize_grads=True)
    theirs = torch.autograd.grad(wanted.square().sum(), tensors, allow_unused=True, materialize_grads=True)
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-10) for a, b in zip(mine, theirs, strict=True))
    assert top == 1 or float(mine[-1].abs().sum()) > 0 or float(mine[1].abs().sum()) > 0


def test_the_balancing_loss_is_least_where_all_experts_are_alike() -> None:
    made = mixture(Routing(4, 2, balance=1.0)).train()
    x = 2 + torch.randn(1, 4000, 6, generator=zoo.seeded(0, "x"), dtype=torch.float64)
    made(x)
    uneven = made.loss
    with torch.no_grad():
        made.router.weight.mul_(1e-9)
    made(x)
    assert uneven is not None
    assert made.loss is not None
    assert made.loss.item() == pytest.approx(1.0, abs=1e-6)
    assert uneven.item() > 1.2
    made.eval()(torch.randn(1, 5, 6, dtype=torch.float64))
    assert made.loss is None


@pytest.mark.parametrize("family", UPCYCLED)
def test_logits_do_not_change_and_everything_runs(family: str, tmp_path: Path) -> None:
    model = zoo.tiny(family)
    fed = zoo.padded(model) if family != "t5" else zoo.inputs(model)
    base = zoo.logits(model, fed)
    surgery.apply(surgery.parse(PROGRAM), model)
    assert relative_error(zoo.logits(model, fed), base) < 1e-6
    assert surgery.verify(model)
    shaken(model)
    wanted = zoo.logits(model, fed)
    assert relative_error(wanted, base) > 1e-2
    surgery.save(model, tmp_path / "out")
    assert torch.equal(zoo.logits(surgery.load(tmp_path / "out"), fed), wanted)
    assert torch.equal(zoo.logits(copy.deepcopy(model), fed), wanted)
    if family != "t5":
        said = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(
            model.generate(**fed, use_cache=True, **said), model.generate(**fed, use_cache=False, **said)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    model = zoo.tiny("llama", dtype=dtype)
    fed = zoo.inputs(model)
    base = zoo.logits(model, fed)
    surgery.apply(surgery.parse(PROGRAM), model)
    found = zoo.logits(model, fed)
    assert found.dtype == dtype
    assert relative_error(found, base) <= 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("attention", ["masked", "hand"])
def test_float64_is_sharp_on_the_reference_decoder(attention: Any) -> None:
    shape = Shape(layers=2, bias=True, attention=attention, gated=attention == "hand")
    model = reference_decoder(shape, 0, torch.float64)
    with torch.no_grad():
        base = model(TOKENS)
        surgery.apply(surgery.parse("moe 3 experts top 2 on ffn"), model, example_inputs=(TOKENS,))
        assert relative_error(model(TOKENS), base) < 1e-12
    assert len(list(mixtures(model))) == 2


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("checkpointed", [False, True])
def test_training_reaches_experts_and_routers(checkpointed: bool) -> None:
    model = upcycled("llama").train()
    fed = zoo.inputs(model)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = model(**fed, labels=fed["input_ids"]).loss
    extra = surgery.auxiliary_loss(model)
    assert extra.requires_grad
    assert 0 < extra.item() < 0.2
    loss.backward()
    for _, module in mixtures(model):
        assert float(module.router.weight.grad.abs().sum()) > 0  # type: ignore[union-attr]
        assert all(float(tensor.grad.abs().sum()) > 0 for tensor in module.experts.parameters())  # type: ignore[union-attr]
    plain = copy.deepcopy(model).eval()(**fed, labels=fed["input_ids"]).loss
    assert loss.item() == pytest.approx((plain + extra).item(), rel=1e-5)
    assert {name for name, tensor in model.named_parameters() if tensor.requires_grad} == {
        f"{path}.{name}" for path, module in mixtures(model) for name, _ in module.named_parameters()
    }


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_a_reentrant_checkpoint_is_noticed() -> None:
    model = upcycled("llama").train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    fed = zoo.inputs(model)
    with pytest.raises(GraphError) as caught:
        model(**fed, labels=fed["input_ids"])
    assert caught.value.diagnostics[0].code == "S333"


def test_adapters_on_experts_and_routers_of_the_same_program() -> None:
    model = upcycled("llama", "moe 3 experts on ffn ; lora rank 2 on experts + router ; lora rank 1 on attn.q ; seed 3")
    fed = zoo.inputs(model)
    assert relative_error(zoo.logits(model, fed), zoo.logits(zoo.tiny("llama"), fed)) < 1e-6
    before = zoo.logits(model, fed)
    with torch.no_grad():
        for tensor in surgery.parameters(model).values():
            tensor.add_(0.1)
    trained = zoo.logits(model, fed)
    assert relative_error(trained, before) > 1e-3
    with surgery.disabled(model):
        assert torch.equal(zoo.logits(model, fed), before)
    assert relative_error(zoo.logits(surgery.merge(model), fed), trained) < 1e-5
    assert len(list(mixtures(model))) == 3


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_copies_of_layers_with_mixtures_are_silent(family: str) -> None:
    model = zoo.tiny(family)
    fed = zoo.inputs(model)
    base = zoo.logits(model, fed)
    surgery.apply(surgery.parse("moe 3 experts on ffn ; repeat layers 1 silent"), model)
    assert relative_error(zoo.logits(model, fed), base) < 1e-6
    assert len(list(mixtures(model))) == 4


def test_noise_is_in_training_only() -> None:
    model = upcycled("llama", "moe 4 experts top 1 noise 50% on ffn ; train router")
    shaken(model)
    fed = zoo.inputs(model)
    assert torch.equal(zoo.logits(model, fed), zoo.logits(model, fed))
    model.train()
    torch.manual_seed(0)
    one, other = (model(**fed).logits for _ in range(2))
    assert not torch.equal(one, other)


def test_the_same_program_gives_the_same_routers_and_another_seed_others() -> None:
    one, same, other = (upcycled("llama", f"{PROGRAM} ; seed {seed}") for seed in (1, 1, 2))
    name = next(path for path, _ in mixtures(one)) + ".router.weight"
    assert torch.equal(one.get_parameter(name), same.get_parameter(name))
    assert not torch.equal(one.get_parameter(name), other.get_parameter(name))


def test_a_compiled_mixture_is_the_same() -> None:
    made = mixture(Routing(4, 2)).eval()
    x = torch.randn(2, 7, 6, generator=zoo.seeded(0, "x"), dtype=torch.float64)
    with torch.no_grad():
        exported = torch.export.export(made, (x,), strict=False).module()
        assert relative_error(exported(x), made(x)) < 1e-13


@pytest.mark.parametrize(("family", "top"), [("llama", 2), ("mistral", 3)])
def test_mixtral_loads_it_with_the_same_logits(family: str, top: int, tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM, MixtralForCausalLM

    model: Any = zoo.tiny("llama", intermediate_size=40)  # grouped products want rows of 16 bytes
    if family == "mistral":
        said = {k: v for k, v in model.config.to_dict().items() if k in MistralConfig().to_dict() and k != "model_type"}
        model = MistralForCausalLM(MistralConfig(**said, sliding_window=4)).eval()
    surgery.apply(surgery.parse(f"moe 4 experts top {top} on ffn"), model)
    shaken(model)
    fed = zoo.inputs(model)
    surgery.export(model, tmp_path / "out", to="mixtral")
    loaded, told = MixtralForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert relative_error(zoo.logits(loaded.eval(), fed), zoo.logits(model, fed)) < 1e-6


@pytest.mark.parametrize(
    ("family", "program"),
    [("llama", "moe 2 experts on ffn in layers 1"), ("qwen2", PROGRAM), ("gpt2", PROGRAM), ("gemma", PROGRAM)],
)
def test_mixtral_is_refused_where_it_cannot_say_the_model(family: str, program: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        surgery.export(upcycled(family, program), tmp_path / "out", to="mixtral")
    assert caught.value.diagnostics[0].code == "S451"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("program", "family", "code", "words"),
    [
        ("moe 2 experts top 3 on ffn", "llama", "S017", "3 experts"),
        ("moe 0 experts top 1 on ffn", "llama", "S013", "0"),
        ("moe 4 experts on ffn", "opt", "S134", "no module of its own"),
        ("moe 4 experts on ffn", "bert", "S134", "no module of its own"),
        ("moe 4 experts on ffn", "mixtral", "S134", "mixture of experts already"),
        ("moe 4 experts on attn", "llama", "S134", "feed-forward"),
        ("moe 4 experts on ffn ; moe 3 experts on ffn in layers 0", "llama", "S103", "moe 3 experts"),
    ],
)
def test_bad_input_is_refused_before_anything_changes(program: str, family: str, code: str, words: str) -> None:
    assert_refused(program, zoo.tiny(family), code, words)
