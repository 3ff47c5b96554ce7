"""`train` and `freeze`: exactly what they say is trained, counted, saved, and refused where it cannot be."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.errors import ModelError, PlanError, ProgramError
from surgery.graph.module import rewritten
from tests import studied, zoo
from tests.reference_decoder import Shape, reference_decoder

FAMILIES = ("llama", "qwen2", "gpt2", "phi3", "gpt_neox", "opt", "bert", "t5", "nano", "byhand")


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters()}


@torch.no_grad()
def stepped(model: nn.Module, seed: int = 0) -> None:
    """What is trained, moved as training would: pruned entries have no gradient and stay zero."""
    for name, tensor in surgery.parameters(model).items():
        draw = 0.2 * torch.randn(tensor.shape, generator=zoo.seeded(seed, name), dtype=torch.float64).to(tensor.dtype)
        tensor.add_(draw * (tensor != 0) if name.endswith(".weight") else draw)


def code(program: str, model: nn.Module, family: str = "llama") -> tuple[str, str]:
    with pytest.raises((PlanError, ModelError)) as refused:
        surgery.plan(surgery.parse(program), model, anatomy=studied.anatomy(family))
    return refused.value.diagnostics[0].code, str(refused.value)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "program",
    [
        "train bias add",
        "train norm + embed",
        "train layers -2..-1\nfreeze norm",
        "train all layers",
        "train norm\ntrain layers 0",
        "train ffn\nlora rank 2 on attn.o\nia3 on ffn.down",
    ],
)
def test_exactly_what_is_said_is_trained_and_counted(family: str, program: str) -> None:
    """The plan's numbers are those of the transformed model, ties and overlaps counted once."""
    one = zoo.specimen(family)
    plan = surgery.plan(surgery.parse(program), one.model, anatomy=studied.anatomy(family))
    surgery.apply(plan, one.model)
    assert trained(one.model) == set(surgery.parameters(one.model))
    count = sum(tensor.numel() for tensor in one.model.parameters() if tensor.requires_grad)
    total = sum(tensor.numel() for tensor in one.model.parameters())
    totals = plan.to_json()["totals"]
    assert totals["trainable"] == plan.cost.trainable == count > 0
    assert totals["trainable_share"] == pytest.approx(count / total, abs=1e-12)
    assert f"{count:,} of {total:,} parameters" in str(plan)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_mean_everything_in_them(family: str) -> None:
    """Also tensors that no role covers."""
    one = zoo.specimen(family)
    anatomy = studied.anatomy(family)
    studied.apply("train layers -1", family, one.model)
    prefixes = [f"{stack.path}.{stack.depth - 1}." for stack in anatomy.stacks]
    wanted = {name for name in names(one.model) if any(name.startswith(prefix) for prefix in prefixes)}
    assert trained(one.model) == wanted != set()


@pytest.mark.parametrize("family", ["gpt2", "bert", "opt", "gpt_neox", "nano"])
def test_bias_means_every_bias(family: str) -> None:
    """Of linear maps and norms; nothing is rewritten for it."""
    one = zoo.specimen(family)
    studied.apply("train bias", family, one.model)
    assert trained(one.model) == {name for name in names(one.model) if name.endswith("bias")} != set()
    assert not list(rewritten(one.model))


@pytest.mark.slow
def test_bitfit_on_minilm(minilm: Any) -> None:
    """Exactly its biases: the plan's share is the one counted."""
    plan = surgery.plan(surgery.parse("train bias"), minilm)
    surgery.apply(plan, minilm)
    wanted = {name for name in names(minilm) if name.endswith(".bias")}
    assert trained(minilm) == wanted
    count = sum(minilm.get_parameter(name).numel() for name in wanted)
    total = sum(tensor.numel() for tensor in minilm.parameters())
    assert plan.cost.trainable == count
    assert plan.to_json()["totals"]["trainable_share"] == pytest.approx(count / total, abs=1e-12)
    assert count / total < 0.01
    assert surgery.verify(minilm)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("base", ["", "quantize base nf4\n", "quantize base int8\n", "prune magnitude 50% on ffn\n"])
def test_added_biases_start_as_no_change_and_switch_off(family: str, base: str) -> None:
    """identity_at_init, off_means_off: to the bit, over any base."""
    one, plain = zoo.specimen(family), zoo.specimen(family)
    if base:
        studied.apply(base, family, plain.model)
    plan = surgery.plan(surgery.parse(base + "train bias add"), one.model, anatomy=studied.anatomy(family))
    surgery.apply(plan, one.model)
    assert torch.equal(one.logits(), plain.logits())
    added = {name for name in surgery.parameters(one.model) if name.endswith("added_bias")}
    assert bool(added) == any(part.role == "bias.new" for step in plan.steps for part in step.parts)
    stepped(one.model)
    if added:
        on = one.logits()
        with surgery.disabled(one.model):
            assert not torch.equal(one.logits(), on)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "t5", "byhand"])
def test_added_biases_merge_into_plain_ones(family: str) -> None:
    """merges: a linear map's own `bias`; ties stay, since a weight does not change."""
    one = zoo.specimen(family, dtype=torch.float64)
    kept = {name: tensor.clone() for name, tensor in one.model.state_dict().items()}
    studied.apply("train bias add in layers 0..1", family, one.model)
    stepped(one.model)
    wanted = one.logits()
    own = {name for name in surgery.parameters(one.model) if not name.endswith("added_bias")}
    surgery.merge(one.model)
    assert not list(rewritten(one.model))
    assert not trained(one.model)
    now = one.model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in kept.items() if name not in own)
    assert {name for name in now if name not in kept} == {name for name in now if name.endswith(".bias")} - set(kept)
    assert (one.logits() - wanted).abs().max() <= 1e-9 * wanted.abs().max()


def test_freeze_wins_whatever_the_order() -> None:
    results = []
    for text in (
        "train layers -2..-1\nfreeze norm\nfreeze attn.q",
        "freeze attn.q\ntrain layers -2..-1\nfreeze norm",
    ):
        model = zoo.tiny("llama")
        studied.apply(text, "llama", model)
        results.append(trained(model))
    assert results[0] == results[1]
    assert not any("norm" in name or "q_proj" in name for name in results[0])
    assert "model.layers.2.self_attn.k_proj.weight" in results[0]
    assert not any(name.startswith("model.layers.0.") for name in results[0])


def test_freezing_biases_leaves_the_weights() -> None:
    model = zoo.tiny("bert")
    studied.apply("train attn\nfreeze bias", "bert", model)
    assert trained(model)
    assert not any(name.endswith("bias") for name in trained(model))


def test_cuts_and_scopes_reach_biases() -> None:
    """`except bias` and `bias in ...` mean tensors, as everything that `train` selects."""
    one, other, scoped = (zoo.tiny("bert") for _ in range(3))
    studied.apply("train attn except bias", "bert", one)
    studied.apply("train attn\nfreeze bias", "bert", other)
    assert trained(one) == trained(other)
    studied.apply("train bias in layers 1 except norm", "bert", scoped)
    assert all(".layer.1." in name and name.endswith("bias") for name in trained(scoped))
    assert trained(scoped)
    assert not any("LayerNorm" in name for name in trained(scoped))


@pytest.mark.parametrize("program", ["train head", "train embed", "train head + embed"])
def test_tied_weights_are_trained_together_and_said_so(program: str) -> None:
    model = zoo.tiny("qwen2")
    plan = surgery.plan(surgery.parse(program), model, anatomy=studied.anatomy("qwen2"))
    surgery.apply(plan, model)
    assert trained(model) == {"model.embed_tokens.weight"}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert plan.cost.trainable == model.lm_head.weight.numel()
    said = [warning for warning in plan.warnings if "share" in warning]
    assert len(said) == (program != "train head + embed")
    assert all("lm_head" in warning and "embed_tokens" in warning for warning in said)


def test_freezing_one_of_two_tied_freezes_both() -> None:
    """Error S115: nothing is left of `train head`, and both statements are named."""
    found, text = code("train head\nfreeze embed", zoo.tiny("qwen2"), "qwen2")
    assert found == "S115"
    assert "`train head`" in text
    assert "`freeze embed`" in text


def test_freeze_without_anything_to_take_out_is_said() -> None:
    plan = surgery.plan(surgery.parse("train norm\nfreeze ffn"), zoo.tiny("llama"), anatomy=studied.anatomy("llama"))
    assert any("`freeze ffn` takes nothing out" in warning for warning in plan.warnings)


def test_four_bits_cannot_be_trained() -> None:
    """Error S114, naming both; what `freeze` takes out or `except` leaves is no conflict."""
    model = zoo.tiny("llama")
    found, text = code("quantize base nf4\ntrain layers -1", model)
    assert found == "S114"
    assert "`quantize base nf4`" in text
    assert "`train on layers -1`" in text
    for right in ("quantize base nf4\ntrain layers -1\nfreeze all linear", "quantize ffn nf4\ntrain attn, bias add"):
        surgery.plan(surgery.parse(right), model, anatomy=studied.anatomy("llama"))


def test_some_rows_of_a_fused_tensor_are_refused_and_all_of_them_are_not() -> None:
    found, text = code("train attn.q", zoo.tiny("gpt2"), "gpt2")
    assert found == "S101"
    assert "fused" in text
    model = zoo.tiny("gpt2")
    studied.apply("train attn.q,k,v", "gpt2", model)
    assert {name.split(".", 3)[3] for name in trained(model)} == {"attn.c_attn.weight", "attn.c_attn.bias"}


def test_no_bias_to_train_is_an_error_with_the_way_out() -> None:
    found, text = code("train bias", zoo.tiny("llama"))
    assert found == "S203"
    assert "train bias add" in text


def test_other_verbs_do_not_take_biases() -> None:
    assert code("lora rank 1 on bias", zoo.tiny("gpt2"), "gpt2")[0] == "S207"


def test_a_pruned_weight_keeps_its_zeros_in_training() -> None:
    """exact_sparsity: steps of AdamW with weight decay; the mask is multiplied into the gradient."""
    model = reference_decoder(Shape(bias=True), dtype=torch.float32)
    tokens = zoo.tokens(model.shape.vocabulary)
    program = surgery.parse("prune magnitude 50% on ffn\ntrain ffn")
    surgery.apply(program, model, example_inputs=(tokens,))
    before = {name: tensor.detach().clone() for name, tensor in surgery.parameters(model).items()}
    optimizer = torch.optim.AdamW(surgery.parameters(model).values(), lr=0.05)
    for _ in range(3):
        model(tokens).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, old in before.items():
        new = surgery.parameters(model)[name]
        assert not torch.equal(old, new)
        if old.dim() == 2:
            assert int((old == 0).sum()) == round(old.numel() / 2)
            assert torch.equal(old == 0, new == 0)
    assert surgery.verify(model, example_inputs=(tokens,))


@pytest.mark.parametrize(
    "program", ["train norm + ffn\nlora rank 2 on attn.q", "train layers -1, embed\nprefix 2 gated"]
)
def test_trained_values_are_saved_and_stay_trained(program: str, tmp_path: Any) -> None:
    """round_trip: the base's own file has them, under their own names, and resuming trains the same tensors."""
    one = zoo.specimen("qwen2")
    studied.apply(program, "qwen2", one.model)
    stepped(one.model)
    assert surgery.verify(one.model)
    surgery.save(one.model, tmp_path / "out")
    loaded = surgery.load(tmp_path / "out")
    assert torch.equal(zoo.logits(loaded, one.inputs), one.logits())
    assert trained(loaded) == trained(one.model)
    assert list(surgery.parameters(loaded)) == list(surgery.parameters(one.model))
    stepped(loaded, seed=1)
    assert surgery.verify(loaded), "the frame law knows after loading what may move"


def test_nothing_else_may_move() -> None:
    """frame: a tensor beside the trained ones that was written to is reported, as is one that is trained by hand."""
    model = zoo.tiny("gpt2")
    studied.apply("train bias", "gpt2", model)
    stepped(model)
    assert surgery.verify(model)
    layer: Any = model.transformer.h[1].mlp.c_fc
    with torch.no_grad():
        layer.weight[0, 0] += 1
    assert not surgery.verify(model)
    with torch.no_grad():
        layer.weight[0, 0] -= 1
    layer.weight.requires_grad_(True)
    assert not surgery.verify(model)


def test_off_leaves_trained_values_as_they_are_and_the_plan_says_so() -> None:
    one = zoo.specimen("llama")
    plan = surgery.plan(surgery.parse("train norm"), one.model, anatomy=studied.anatomy("llama"))
    assert "as they do when switched off" in str(plan)
    untouched = one.logits()
    surgery.apply(plan, one.model)
    stepped(one.model)
    on = one.logits()
    with surgery.disabled(one.model):
        assert torch.equal(one.logits(), on)
    assert not torch.equal(on, untouched)


def test_gradients_reach_what_is_trained_through_adapters_masks_and_codes() -> None:
    one = zoo.specimen("gpt2", dtype=torch.float32)
    studied.apply(
        "train bias + norm\nquantize base nf4\nlora rank 2 on attn.o + ffn.up\nprune magnitude 30% on ffn",
        "gpt2",
        one.model,
    )
    stepped(one.model)
    one.model.train()(**one.inputs).logits.square().mean().backward()
    with_gradient = {name for name, tensor in one.model.named_parameters() if tensor.grad is not None}
    assert with_gradient == trained(one.model)
    # A constant added to all keys changes no softmax: that bias has no gradient to speak of.
    assert all(
        tensor.grad is not None and tensor.grad.abs().max() > 0 for tensor in surgery.parameters(one.model).values()
    )


def test_trained_weight_under_an_adapter_has_the_gradient_of_the_formula() -> None:
    """The fused product is for frozen weights; a trained one takes the written graph."""
    plain = nn.Sequential(nn.Linear(5, 7))

    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Embedding(11, 5)
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 5)) for _ in range(2)])
            self.lm = nn.Linear(5, 11)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.token(ids)
            for block in self.blocks:
                x = x + block(x)
            return self.lm(x)

    del plain
    torch.manual_seed(0)
    model, tokens = Toy().double(), zoo.tokens(11)
    program = "lora rank 2 on ffn.up\ntrain ffn.up"
    surgery.apply(surgery.parse(program), model, example_inputs=(tokens,))
    stepped(model)
    merged = copy.deepcopy(model)
    model(tokens).square().sum().backward()
    surgery.merge(merged)
    merged.requires_grad_(True)
    merged(tokens).square().sum().backward()
    for block, other in zip(model.blocks, merged.blocks, strict=True):
        assert torch.allclose(block[0].weight.grad, other[0].weight.grad, atol=1e-10)
        assert torch.allclose(block[0].bias.grad, other[0].bias.grad, atol=1e-10)


@pytest.mark.parametrize("text", ["train norm as x", "freeze norm as x", "optimize sgd lr 1 as x"])
def test_a_name_that_switches_nothing_is_refused(text: str) -> None:
    with pytest.raises(ProgramError) as refused:
        surgery.parse(text)
    assert refused.value.diagnostics[0].code == "S017"
    assert refused.value.diagnostics[0].span is not None
    surgery.parse("train bias add as x")


def test_16_bit_training_is_warned_of() -> None:
    model = zoo.tiny("llama", dtype=torch.bfloat16)
    plan = surgery.plan(surgery.parse("train norm"), model, anatomy=studied.anatomy("llama"))
    assert any("16-bit" in warning for warning in plan.warnings)


def test_copies_train_tensors_of_their_own() -> None:
    one = zoo.specimen("llama")
    studied.apply("train norm\nia3", "llama", one.model)
    copied = copy.deepcopy(one.model)
    wanted = one.logits()
    stepped(copied)
    assert trained(copied) == trained(one.model)
    assert torch.equal(one.logits(), wanted)
    assert not torch.equal(zoo.logits(copied, one.inputs), wanted)


def test_paths_select_tensors() -> None:
    model = zoo.tiny("llama")
    studied.apply('train "model.layers.*.mlp.*" in layers 1', "llama", model)
    assert trained(model) == {f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
