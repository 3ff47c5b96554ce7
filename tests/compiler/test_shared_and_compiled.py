"""Modules that stand in several places, compiled models, and what a merge or an apply must leave alone."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.compiler import record_of
from surgery.errors import GraphError, PlanError, SurgeryError
from surgery.graph.draft import Draft
from surgery.graph.module import Rewritten
from tests import zoo

FED = (zoo.tokens(51),)


def applied(program: str, model: nn.Module, example: Any = None) -> Any:
    """The model under a program, every added parameter a little away from where it starts."""
    surgery.apply(surgery.parse(program), model, example_inputs=example)
    for name, parameter in surgery.parameters(model).items():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=zoo.seeded(5, name), dtype=parameter.dtype))
    return model


def gap(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, as a share of the largest entry."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


# Compiled models


COMPILED = (
    "lora rank 2 on attn.q as one\nlora rank 2 dora on attn.v as two",
    "quantize base nf4\nlora rank 2 on attn.q,v as one\nlora rank 2 dropout 10% on ffn as two",
    "lora rank 2 on attn.q as one\nprefix 3 gated on all layers as two",
)


@pytest.mark.parametrize("program", COMPILED)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_compiled_model_follows_the_switches(family: str, program: str) -> None:
    """off_means_off: `disabled` and `activate` reach code that was compiled before, and so does switching on again."""
    model = applied(program, zoo.tiny(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 1}))
    fed = zoo.inputs(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")

    def both() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return tuple(each(**fed, use_cache=False).logits for each in (compiled, model))

    seen = []
    found, wanted = both()
    assert gap(found, wanted) <= 1e-5
    seen.append(wanted)
    with surgery.disabled(model):
        found, wanted = both()
        assert torch.equal(found, wanted), "the base to the bit"
        seen.append(wanted)
    for names in (("one",), ("two",)):
        surgery.activate(model, *names)
        found, wanted = both()
        assert gap(found, wanted) <= 1e-5
        seen.append(wanted)
    surgery.activate(model)
    found, wanted = both()
    assert gap(found, wanted) <= 1e-5
    assert torch.equal(wanted, seen[0])
    assert min(gap(a, b) for i, a in enumerate(seen) for b in seen[:i]) > 1e-3, "every switch changes the logits"
    torch._dynamo.reset()


def test_a_model_compiled_while_disabled_wakes_up() -> None:
    """off_means_off: the state at the first call is not baked in either."""
    model = applied("lora rank 2 on ffn", zoo.plain("byhand", dtype=torch.float32, depth=1), FED)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    base = zoo.plain("byhand", dtype=torch.float32, depth=1)
    with torch.no_grad():
        with surgery.disabled(model):
            assert torch.equal(compiled(*FED), base(*FED))
        assert gap(compiled(*FED), model(*FED)) <= 1e-5
        assert gap(compiled(*FED), base(*FED)) > 1e-3
    torch._dynamo.reset()


# Merges


def test_a_merge_into_a_scaled_embedding_keeps_its_class_and_loads(tmp_path: Path) -> None:
    """merges: the factor of the lookup's own forward stays where it is, so that the files load as that model."""
    model = zoo.tiny("gemma")
    kind, before = type(model.model.embed_tokens), model.model.embed_tokens.weight.detach().clone()
    assert kind is not nn.Embedding
    applied("lora rank 2 on embed", model)
    fed = zoo.inputs(model)
    wanted = zoo.logits(model, fed)
    assert gap(wanted, zoo.logits(zoo.tiny("gemma"), fed)) > 1e-3
    surgery.merge(model)
    merged = zoo.logits(model, fed)
    assert gap(merged, wanted) <= 1e-5
    assert type(model.model.embed_tokens) is kind
    assert gap(model.model.embed_tokens.weight.detach(), before) < 1, "the factor must not be in the table"
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(zoo.logits(again, fed), merged)


def test_a_merge_without_training_changes_no_bit_of_a_scaled_embedding() -> None:
    """merges: what adds nothing changes nothing."""
    model = surgery.apply(surgery.parse("lora rank 2 on embed"), zoo.tiny("gemma"))
    surgery.merge(model)
    found, wanted = model.model.embed_tokens.weight, zoo.tiny("gemma").model.embed_tokens.weight
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


def test_a_merge_refuses_to_lose_what_is_switched_off() -> None:
    """Error: what is off would be neither merged nor kept; it is named, and nothing is done until all are on."""
    model = applied("lora rank 2 on attn.q as one\nlora rank 3 on attn.q,v as two", zoo.tiny("llama"))
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
    assert gap(zoo.logits(model, fed), both) <= 1e-5
    assert gap(one, both) > 1e-4
    assert not surgery.parameters(model)


# What cannot be rewritten


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


# Modules in several places


def sharing() -> zoo.PlainDecoder:
    """One module is the wide projection of two blocks."""
    model = zoo.plain("nano", dtype=torch.float32)
    model.blocks[1].wide = model.blocks[0].wide
    return model


def test_a_shared_module_is_rewritten_once_with_the_adapters_of_all_its_places() -> None:
    """Planning: two statements on two places of one module meet in one graph; what is planned is what is made."""
    program = surgery.parse("lora rank 2 on ffn.up in layers 0 as a\nlora rank 3 on ffn.up in layers 1 as b")
    model = sharing()
    before = model(*FED).detach()
    plan = surgery.plan(program, model, example_inputs=FED)
    surgery.apply(plan, model)
    site = model.blocks[0].wide
    assert isinstance(site, Rewritten)
    assert model.blocks[1].wide is site
    assert site.branches() == {"a", "b"}
    assert torch.equal(model(*FED), before)
    added = surgery.parameters(model)
    assert len(added) == 4
    assert sum(tensor.numel() for tensor in added.values()) == plan.cost.trainable == (2 + 3) * (21 + 44)
    for name, tensor in added.items():
        tensor.data.add_(0.1 * torch.randn(tensor.shape, generator=zoo.seeded(5, name)))
    seen = [model(*FED).detach()]
    for name in ("a", "b"):
        surgery.activate(model, name)
        seen.append(model(*FED).detach())
    assert not any(torch.equal(one, two) for i, one in enumerate([before, *seen]) for two in seen[i:])
    surgery.activate(model)
    assert torch.equal(model(*FED), seen[0])
    surgery.merge(model)
    assert gap(model(*FED).detach(), seen[0]) <= 1e-5
    assert type(model.blocks[0].wide) is nn.Linear
    assert model.blocks[1].wide is model.blocks[0].wide


@pytest.mark.parametrize("program", ["lora rank 2 on ffn.up", "lora rank 2 dora on all linear\nquantize attn nf4"])
def test_a_shared_module_counts_once(program: str) -> None:
    """Planning: trained numbers and bytes are those of the model, where one statement finds the module twice."""
    model = sharing()
    plan = surgery.plan(surgery.parse(program), model, example_inputs=FED)
    surgery.apply(plan, model)
    assert sum(tensor.numel() for tensor in surgery.parameters(model).values()) == plan.cost.trainable
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    assert sum(t.numel() * t.element_size() for t in tensors) == plan.cost.bytes_after


def test_one_place_of_a_shared_module_is_told_to_be_more() -> None:
    """Planning: whoever selects a shared module in one layer is warned that it stands in another."""
    program = surgery.parse("lora rank 2 on ffn.up in layers 1")
    plan = surgery.plan(program, sharing(), example_inputs=FED)
    told = [each for each in plan.warnings if "blocks.0.wide" in each and "merging" not in each]
    assert len(told) == 1, plan.warnings
    assert str(program.statements[0]) in told[0]
    assert "blocks.1.wide" in told[0]
    alone = surgery.plan(program, zoo.plain("nano", dtype=torch.float32), example_inputs=FED)
    assert not any("blocks.0.wide" in each for each in alone.warnings)
    whole = surgery.plan(surgery.parse("lora rank 2 on ffn.up"), sharing(), example_inputs=FED)
    assert not [each for each in whole.warnings if "too" in each], "all its places were selected"


def test_a_shared_module_is_not_untied_by_a_merge() -> None:
    """Planning: a warning is true. One module that stands twice stays one; two modules with one tensor become two."""
    program = surgery.parse("lora rank 2 on ffn.up")
    assert not [w for w in surgery.plan(program, sharing(), example_inputs=FED).warnings if "unties" in w]
    tied = zoo.plain("nano", dtype=torch.float32)
    tied.blocks[1].wide.weight = tied.blocks[0].wide.weight
    told = [w for w in surgery.plan(program, tied, example_inputs=FED).warnings if "unties" in w]
    assert told
    assert all("blocks.0.wide" in each and "blocks.1.wide" in each for each in told)


def test_statements_that_meet_in_a_shared_module_can_conflict() -> None:
    """Error: two adapters without a name meet there, whatever layers they were asked for in."""
    program = surgery.parse("lora rank 2 on ffn.up in layers 0\nlora rank 3 on ffn.up in layers 1")
    with pytest.raises(PlanError) as caught:
        surgery.plan(program, sharing(), example_inputs=FED)
    assert {each.code for each in caught.value.diagnostics} == {"S103"}
    surgery.plan(program, zoo.plain("nano", dtype=torch.float32), example_inputs=FED)


# All or nothing


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


def test_a_copy_of_a_model_with_shared_places_shares_them_too() -> None:
    """frame: copied once, standing twice, switched alone."""
    model = applied("lora rank 2 on ffn.up", sharing(), FED)
    copied = copy.deepcopy(model)
    assert copied.blocks[0].wide is copied.blocks[1].wide
    assert torch.equal(copied(*FED), model(*FED))
    with surgery.disabled(copied):
        assert torch.equal(copied(*FED), sharing()(*FED))
        assert not torch.equal(model(*FED), sharing()(*FED))


def test_a_model_is_not_left_with_half_a_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Error: when a fold stops with an error the model computes what it did, and can be merged later."""
    merging = sys.modules["surgery.compiler.merge"]  # the package has the function under that name
    model = applied("lora rank 2 on attn.q,v", zoo.tiny("llama"))
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
    assert gap(zoo.logits(model, fed), wanted) <= 1e-5
    surgery.merge(model)
    assert gap(zoo.logits(model, fed), wanted) <= 1e-5
    assert not any(isinstance(each, Rewritten) for each in model.modules())
