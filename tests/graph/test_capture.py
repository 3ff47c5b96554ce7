"""Modules with a forward of their own: rewritten as what they compute, or refused, never taken for another."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery
from surgery.errors import GraphError, SurgeryError
from surgery.graph.affine import NotAffine
from surgery.graph.fold import fold
from surgery.graph.module import Rewritten, added_parameters, switched
from surgery.operations.base import Operation
from surgery.operations.lora import Lora
from surgery.operations.prune import Prune
from surgery.operations.quantize import Quantize
from tests import zoo
from tests.graph.test_site import holder, rewrite


class InOut(nn.Module):
    """A linear map stored (in, out), as GPT-2's Conv1D holds it; what is done with the product differs below."""

    def __init__(self, inputs: int = 6, outputs: int = 9) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * inputs**-0.5)
        self.bias = nn.Parameter(torch.randn(outputs))
        self.nf = outputs

    def product(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)

    def forward(self, x: Tensor) -> Tensor:
        size = x.size()[:-1] + (self.nf,)  # noqa: RUF005, a traced size cannot be unpacked
        return self.product(x).view(size)


class OneMore(InOut):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Residual(InOut):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class TwiceTheProduct(InOut):
    def product(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight, alpha=2)


class HalfTheBias(InOut):
    def product(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight, beta=0.5)


class FirstFour(InOut):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., :4]


class ByHeads(InOut):
    def forward(self, x: Tensor) -> Tensor:
        return self.product(x).view(x.size(0), x.size(1), 3, 3)


class Matmul(InOut):
    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.weight) + self.bias


class Turned(InOut):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.T, self.bias)


class AtSign(InOut):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class MatmulAlone(InOut):
    def __init__(self, inputs: int = 6, outputs: int = 9) -> None:
        super().__init__(inputs, outputs)
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.weight)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 2, self.bias)


class Cut(nn.Linear):
    """No stored weight gives a map whose entries differ from zero where the factor is zero."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("keep", (torch.arange(outputs * inputs) % 3 > 0).float().view(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.keep, self.bias)


class OfNormOne(nn.Linear):
    """A factor times the weight, but the factor is not the same for another weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / self.weight.norm(), self.bias)


class TimesItsMean(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.weight.mean(), self.bias)


class FunctionalDropout(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(F.linear(x, self.weight, self.bias), 0.5, self.training)


class ChildDropout(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(F.linear(x, self.weight, self.bias))


class Squared(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) ** 2


class PositivePart(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y * (y > 0)


class Squashed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y / (1.0 + y.abs())


class Rectified(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.linear(x, self.weight, self.bias))


FED = (zoo.tokens(51),)


def decoder(make: Callable[[int, int], nn.Module], child: str = "lift", **sizes: Any) -> zoo.PlainDecoder:
    """A small decoder in plain torch in which one projection of every block is another module. float32, eval mode."""
    model = zoo.plain("byhand", dtype=torch.float32, **sizes)
    for number, block in enumerate(model.blocks):
        old = getattr(block, child)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            setattr(block, child, make(old.in_features, old.out_features))
    return model.eval()


def applied(program: str, model: nn.Module) -> Any:
    return surgery.apply(surgery.parse(program), model, example_inputs=FED)


def trained(model: nn.Module) -> Any:
    """Every added parameter a little away from where it starts."""
    for name, parameter in surgery.parameters(model).items():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=zoo.seeded(5, name), dtype=parameter.dtype))
    return model


def gap(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, as a share of the largest entry."""
    return float(((found - wanted).abs().max() / wanted.abs().max()).detach())


LOOKALIKES = {
    "plus one": OneMore,
    "plus the input": lambda: Residual(6, 6),
    "alpha": TwiceTheProduct,
    "beta": HalfTheBias,
    "first four": FirstFour,
    "by heads": ByHeads,
}


@pytest.mark.parametrize("name", LOOKALIKES)
def test_what_only_looks_like_a_plain_map_is_taken_for_what_it_is(name: str) -> None:
    """identity_at_init and merges: the same bits at first, the trained function after a merge, or a refusal."""
    torch.manual_seed(0)
    module, x = LOOKALIKES[name](), torch.randn(2, 3, 6)
    wanted = module(x).detach()
    try:
        made = rewrite(module, Lora(rank=2))
    except GraphError as error:
        assert {each.code for each in error.diagnostics} <= {"S301", "S302"}  # noqa: PT017
        assert torch.equal(module(x), wanted)
        return
    assert torch.equal(made(x), wanted)
    for parameter in added_parameters(holder(made)).values():
        parameter.data.normal_()
    moved = made(x).detach()
    assert gap(moved, wanted) > 1e-2
    try:
        merged = fold(made)
    except NotAffine:
        merged = made
    assert merged(x).shape == moved.shape
    assert gap(merged(x), moved) <= 1e-5


def test_a_forward_set_on_the_instance_is_refused() -> None:
    """Error: the class's forward is not what such a module computes; no adapter goes where the base would change."""
    model = decoder(nn.Linear)
    module = model.blocks[1].lift
    module.forward = types.MethodType(lambda self, x: F.linear(x, self.weight * 3, self.bias), module)
    wanted = model(*FED).detach()
    with pytest.raises(SurgeryError) as caught:
        applied("lora rank 2 on ffn.up", model)
    assert {each.code for each in caught.value.diagnostics} == {"S301"}
    assert "blocks.1.lift" in str(caught.value)
    assert torch.equal(model(*FED), wanted)
    assert not any(isinstance(each, Rewritten) for each in model.modules())


PROGRAMS = (
    "lora rank 2 on ffn.up",
    "lora rank 2 dora on ffn.up",
    "lora rank 2 init pissa on ffn.up",
    "prune magnitude 50% on ffn.up",
    "prune magnitude 2:4 on ffn.up",
    "quantize ffn.up nf4",
    "quantize ffn.up nf4 compute fp32",
)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("kind", [Matmul, MatmulAlone, Turned, AtSign])
def test_every_method_knows_an_in_out_weight(kind: type[InOut], program: str) -> None:
    """identity_at_init, exact_sparsity and merges hold for matmul(x, weight) as they do for F.linear(x, weight)."""
    base = decoder(kind, width=24)
    before = base(*FED).detach()
    weights = [block.lift.weight.detach().clone() for block in base.blocks]
    model = applied(program, base)
    start = model(*FED).detach()
    if program.startswith("lora"):
        assert gap(start, before) <= 1e-5
        with surgery.disabled(model):
            assert "pissa" in program or torch.equal(model(*FED), before)
        moved = trained(model)(*FED).detach()
        assert gap(moved, start) > 1e-3
    else:
        moved = start
        assert 1e-3 < gap(start, before) < 1
    surgery.merge(model)
    assert gap(model(*FED).detach(), moved) <= 1e-5
    for block, weight in zip(model.blocks, weights, strict=True):
        assert type(block.lift) is kind
        merged = block.lift.weight.detach()
        assert merged.shape == weight.shape
        if "50%" in program:
            assert int((merged == 0).sum()) == round(0.5 * weight.numel())
            assert merged.abs().sum() > 0.7 * weight.abs().sum(), "the smallest are what goes"
        if "2:4" in program:
            groups = merged.t().unflatten(-1, (-1, 4))
            assert bool(((groups != 0).sum(-1) == 2).all()), "two of four neighbours along the input stay"
        if "prune" in program:
            assert torch.equal(merged[merged != 0], weight[merged != 0])


def test_dora_starts_from_the_norms_of_the_outputs_also_for_in_out_weights() -> None:
    """dora: the magnitude is one number for each output, the norm of its weights."""
    torch.manual_seed(0)
    module = Matmul()
    norms = torch.linalg.vector_norm(module.weight.detach(), dim=0)
    made = rewrite(module, Lora(rank=2, dora=True))
    torch.testing.assert_close(made.get_parameter("a0_lora_magnitude").detach(), norms)


def test_a_mode_that_a_trace_would_freeze_is_refused() -> None:
    """Error: dropout that reads `self.training` in the forward would stay on, or off, for ever."""
    for mode in (True, False):
        model = decoder(FunctionalDropout).train(mode)
        with pytest.raises(SurgeryError) as caught:
            applied("lora rank 2 on ffn.up", model)
        assert {each.code for each in caught.value.diagnostics} == {"S301"}
        assert "blocks.0.lift" in str(caught.value)
        assert not any(isinstance(each, Rewritten) for each in model.modules())


@pytest.mark.parametrize("captured", [True, False])
def test_a_child_that_drops_follows_the_mode(captured: bool) -> None:
    """identity_at_init: in training the same entries are dropped as before, in evaluation none."""
    model, plain = decoder(ChildDropout), decoder(ChildDropout)
    applied("lora rank 2 on ffn.up", model.train(captured))
    assert sum(isinstance(each, Rewritten) for each in model.modules()) == 3
    assert torch.equal(model.eval()(*FED), plain(*FED))
    drawn = []
    for each in (model, plain):
        torch.manual_seed(3)
        drawn.append(each.train()(*FED).detach())
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], plain.eval()(*FED))


@pytest.mark.parametrize("kind", [Squared, PositivePart, Squashed, Rectified])
def test_what_is_not_affine_stays_as_it_is_and_the_rest_merges(kind: type[nn.Linear]) -> None:
    """merges: a place that no matrix can stand for keeps its graph; every other place is folded, and all compute on."""
    model = trained(applied("lora rank 2 on all linear", decoder(kind, "wv")))
    wanted = model(*FED).detach()
    places = sum(isinstance(each, Rewritten) for each in model.modules())
    surgery.merge(model)
    left = {path for path, each in model.named_modules() if isinstance(each, Rewritten)}
    assert left == {f"blocks.{number}.wv" for number in range(3)} < {*left, *range(places)}
    assert gap(model(*FED).detach(), wanted) <= 1e-5
    surgery.merge(model)
    assert gap(model(*FED).detach(), wanted) <= 1e-5


def test_a_plan_tells_what_will_not_merge_and_why() -> None:
    """Planning: a nonlinearity inside a place is a warning, before anything is done."""
    program = surgery.parse("lora rank 2 on attn.v")
    plan = surgery.plan(program, decoder(Rectified, "wv"), example_inputs=FED)
    told = [each for each in plan.warnings if "merge" in each]
    assert told, plan.warnings
    assert any("relu" in each and "blocks.0.wv" in each for each in told), told
    assert all(each in str(plan).replace("\n", " ") or each.split()[0] in str(plan) for each in told)
    assert not any("merge" in each for each in surgery.plan(program, decoder(nn.Linear), example_inputs=FED).warnings)


def test_a_weight_that_is_changed_before_its_use_is_solved_for() -> None:
    """merges: the class stays, and the weight that it stores is the one from which its forward makes the merged map."""
    model = decoder(Doubled)
    before = [block.lift.weight.detach().clone() for block in model.blocks]
    trained(applied("lora rank 2 alpha 3 on ffn.up", model))
    added = {name: tensor.detach().clone() for name, tensor in surgery.parameters(model).items()}
    wanted = model(*FED).detach()
    surgery.merge(model)
    assert gap(model(*FED).detach(), wanted) <= 1e-5
    for number, (block, old) in enumerate(zip(model.blocks, before, strict=True)):
        assert type(block.lift) is Doubled
        a, b = (added[f"blocks.{number}.lift.lora_{letter}"] for letter in "AB")
        torch.testing.assert_close(block.lift.weight.detach(), old + 1.5 * (b @ a) / 2, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(block.lift.weight, old)


def test_a_place_that_is_not_solved_for_keeps_its_graph() -> None:
    """merges: it computes on, as itself or rewritten, never as another class; its neighbours are folded."""
    model = trained(applied("lora rank 2 on ffn.up + ffn.down", decoder(OneMore)))
    wanted = model(*FED).detach()
    surgery.merge(model)
    assert gap(model(*FED).detach(), wanted) <= 1e-5
    for block in model.blocks:
        assert isinstance(block.lift, (Rewritten, OneMore))
        assert type(block.drop) is nn.Linear


def test_no_weight_is_stored_that_would_not_do() -> None:
    """merges: where the forward cuts entries away, a full matrix cannot come from any weight, and folding says so."""
    made = rewrite(Cut(6, 9), Lora(rank=2))
    fold(made)
    made = rewrite(Cut(6, 9), Lora(rank=2))
    made.get_parameter("a0_lora_B").data.fill_(0.5)
    with pytest.raises(NotAffine):
        fold(made)


@pytest.mark.parametrize("kind", [Doubled, Cut, OfNormOne, TimesItsMean])
def test_a_fold_gives_the_right_numbers_or_none(kind: type[nn.Linear]) -> None:
    """merges: what is put back computes what was there; a forward that cannot be undone is no plain map."""
    torch.manual_seed(0)
    made, x = rewrite(kind(6, 9), Lora(rank=2)), torch.randn(2, 3, 6)
    for parameter in added_parameters(holder(made)).values():
        parameter.data.normal_()
    wanted = made(x)
    try:
        merged = fold(made)
    except NotAffine:
        merged = made
    assert gap(merged(x), wanted) <= 1e-5


@pytest.mark.parametrize("operation", [Lora(rank=2), Quantize(format="nf4"), Prune(score="magnitude", amount=0.5)])
def test_a_rewritten_map_is_called_as_the_one_before(operation: Operation) -> None:
    """frame: by the keyword that torch's own linear map and lookup have, as well as by place."""
    torch.manual_seed(0)
    made, x = rewrite(nn.Linear(6, 9), operation), torch.randn(2, 6)
    assert torch.equal(made(input=x), made(x))
    if isinstance(operation, Lora):
        lookup = nn.Embedding(11, 9)
        ids = torch.tensor([[1, 3]])
        wanted = lookup(input=ids)
        assert torch.equal(rewrite(lookup, operation)(input=ids), wanted)


LAYOUTS: dict[str, Callable[[int], Tensor]] = {
    "first half": lambda n: torch.randn(3, 5, 2 * n)[..., :n],
    "second half": lambda n: torch.randn(3, 5, 2 * n)[..., n:],
    "every other": lambda n: torch.randn(4, 7, 2 * n)[..., ::2],
    "first position": lambda n: torch.randn(4, 9, n)[:, 0],
    "without the last": lambda n: torch.randn(3, 9, n)[:, :-1],
    "features in front": lambda n: torch.randn(5, n, 4).transpose(1, 2),
    "transposed": lambda n: torch.randn(n, 33).t(),
    "batch second": lambda n: torch.randn(7, 2, n).transpose(0, 1),
    "expanded": lambda n: torch.randn(1, 1, n).expand(3, 5, n),
    "one row": lambda n: torch.randn(n),
    "four dimensions": lambda n: torch.randn(2, 3, 4, n),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_identity_holds_however_the_input_lies_in_memory(layout: str) -> None:
    """identity_at_init: to the bit for views, cuts and transposes too, with gradients and without, biased or not."""
    torch.manual_seed(0)
    for outputs, inputs in ((37, 24), (384, 384), (1536, 384)):
        for bias in (True, False):
            module = nn.Linear(inputs, outputs, bias).requires_grad_(False)
            x = LAYOUTS[layout](inputs)
            wanted = module(x)
            made = rewrite(module, Lora(rank=8))
            for wants in (True, False):
                with torch.set_grad_enabled(wants):
                    assert torch.equal(made(x), wanted), (outputs, inputs, bias, wants)


@pytest.mark.parametrize("layout", ["every other", "features in front", "expanded"])
def test_the_gradient_holds_however_the_input_lies_in_memory(layout: str) -> None:
    """lora: gradients of a view are those of its copy."""
    torch.manual_seed(0)
    made = rewrite(nn.Linear(6, 9).requires_grad_(False), Lora(rank=2))
    a, b = made.get_parameter("a0_lora_A"), made.get_parameter("a0_lora_B")
    b.data.normal_()
    x = LAYOUTS[layout](6)
    pull = torch.randn(made(x).shape)
    for given in (x, x.contiguous()):
        found = torch.autograd.grad((made(given) * pull).sum(), (a, b))
        wanted = torch.autograd.grad((F.linear(F.linear(x, a), b) * pull).sum(), (a, b))
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_branches_on_a_matmul_can_be_switched_off() -> None:
    """off_means_off: the base to the bit, under codes and masks too."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8)
    operations = (Prune(score="magnitude", amount=0.5), Quantize(format="nf4"))
    base = rewrite(Matmul(8, 9), *operations)
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8)
    both = rewrite(Matmul(8, 9), *operations, Lora(rank=2))
    for name in ("a2_lora_A", "a2_lora_B"):
        both.get_parameter(name).data.normal_()
    wanted = base(x)
    assert not torch.allclose(both(x), wanted)
    with switched(holder(both), {None}):
        assert torch.equal(both(x), wanted)
