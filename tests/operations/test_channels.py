"""Channels of the residual stream cut out: equal to the whole with them at zero, told where norms make that untrue."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from surgery.errors import PlanError
from surgery.verify.bounds import merge_bound, relative_error
from tests import zoo
from tests.operations.cut import TOKENS, decoder, generates_alike, largest, loaded_again, run, shapes, texts
from tests.reference_decoder import ReferenceDecoder, Shape


def weights_by_channel(model: ReferenceDecoder, of: Mapping[str, Tensor]) -> Tensor:
    """Sums over all that belongs to each channel, written out: `of` is one tensor for each parameter."""
    found = of["embed.weight"].sum(0) + of["norm.weight"]
    found = found + (0 if model.shape.tied else of["head.weight"].sum(0))
    found = found + (0 if model.position is None else of["position.weight"].sum(0))
    for index in range(len(model.layers)):
        mine = {name.removeprefix(f"layers.{index}."): each for name, each in of.items() if f"layers.{index}." in name}
        for name, tensor in mine.items():
            writes = name.startswith(("attention.o.", "ffn.down."))
            if "norm" in name or (writes and name.endswith("bias")):
                found = found + tensor
            elif not name.endswith("bias"):
                found = found + (tensor.sum(1) if writes else tensor.sum(0))
    return found


def magnitudes(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().abs() for name, parameter in model.named_parameters()}


@torch.no_grad()
def mask(whole: nn.Module, small: nn.Module) -> list[int]:
    """Zero what a narrower model has not; of the embedding, which was not rescaled, it is seen which channels stay."""
    path = next(path for path, module in whole.named_modules() if isinstance(module, nn.Embedding))
    wide, narrow = whole.get_submodule(path).weight, small.get_submodule(path).weight  # type: ignore[union-attr]
    kept = [next(i for i in range(wide.shape[1]) if torch.equal(wide[:, i], column)) for column in narrow.t()]
    gone = sorted({*range(wide.shape[1])} - {*kept})
    assert kept == sorted(kept)
    left = dict(small.named_parameters())
    for name, parameter in whole.named_parameters():
        for axis, (before, now) in enumerate(zip(parameter.shape, left[name].shape, strict=True)):
            if before != now:
                assert (before, now) == (wide.shape[1], len(kept))
                parameter.index_fill_(axis, torch.tensor(gone), 0)
    return kept


def look_at(whole: nn.Module, small: nn.Module, kept: list[int]) -> None:
    """Let LayerNorms take mean and variance of these channels alone, with the gain and eps that they have now."""

    def hook(now: Any) -> Any:
        def instead(module: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
            found, gain = torch.zeros_like(args[0]), now.weight.to(args[0].dtype)
            found[..., kept] = F.layer_norm(args[0][..., kept], (len(kept),), gain, module.bias[kept], now.eps)
            return found

        return instead

    for path, module in whole.named_modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(hook(small.get_submodule(path)))


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(shape=shapes, share=st.integers(5, 70), seed=st.integers(0, 99))
def test_fewer_channels_equal_those_at_zero(shape: Shape, share: int, seed: int) -> None:
    """To 1e-10 in float64, behind gains that were rescaled; those that stay have the largest sums of |w|."""
    small, whole = decoder(f"prune channels {share}%", shape, seed), decoder("", shape, seed)
    before = run(whole)
    kept = largest(weights_by_channel(whole, magnitudes(whole)), shape.width - round(share / 100 * shape.width))
    assert mask(whole, small) == kept
    assert torch.equal(small.layers[-1].ffn.up.weight, whole.layers[-1].ffn.up.weight[:, kept])
    assert torch.equal(small.layers[0].attention.o.weight, whole.layers[0].attention.o.weight[kept])
    assert small.layers[0].ffn.up.in_features == small.layers[0].ffn.down.out_features == len(kept)
    assert (small.head.weight is small.embed.weight) == shape.tied
    assert (run(small) - run(whole)).abs().max() < 1e-10
    assert torch.equal(before, run(whole)) == (len(kept) == shape.width)


def test_gain_and_eps_make_up_for_the_mean_over_fewer() -> None:
    """gain * sqrt(width / left), eps * width / left: with an eps that matters, and to rounding in float64."""

    def with_eps(program: str) -> ReferenceDecoder:
        model = decoder("")
        for module in model.modules():
            if hasattr(module, "eps"):
                module.eps = 5e-3  # large enough to be seen
        return surgery.apply(surgery.parse(program), model, example_inputs=(TOKENS,)) if program else model

    small, whole = with_eps("prune channels 50% by random"), with_eps("")
    kept = mask(whole, small)
    assert len(kept) == 16
    assert torch.allclose(small.norm.weight, whole.norm.weight[kept] * 2**0.5, rtol=1e-15)
    assert small.layers[0].ffn_norm.eps == 1e-2
    assert (run(small) - run(whole)).abs().max() < 1e-12


# An eps of each family with RMSNorms, large enough to be seen.
EPS = {family: {"rms_norm_eps": 1e-3} for family in ("llama", "qwen2", "gemma", "phi3")}
EPS |= {"t5": {"layer_norm_epsilon": 1e-3, "num_layers": 3}}  # T5's own caches are as deep as its encoder
# Family, share, whether a configuration can say it: a head's width is no number of some, others scale by the width.
CUTS = [("llama", "50%", True), ("gpt2", "40% nearest", False)]
MORE = [
    ("llama", "40% nearest", False),  # 14 channels are no multiple of four heads, which its configuration wants
    ("qwen2", "25%", True),
    ("gemma", "40% nearest", False),
    ("phi3", "40%", False),
    ("t5", "40% nearest", False),
    ("gpt_neox", "40% nearest", False),
    ("opt", "40% nearest", False),
    ("bert", "40% nearest", False),
]


@pytest.mark.parametrize(
    ("family", "share", "said"), [*CUTS, *(pytest.param(*each, marks=pytest.mark.slow) for each in MORE)]
)
def test_transformers_models_equal_the_masked_ones(family: str, share: str, said: bool, tmp_path: Path) -> None:
    """To 1e-6 of the largest logit, float32's own rounding aside; behind LayerNorms the error is told."""
    small, whole = (zoo.tiny(family, **EPS.get(family, {})) for _ in range(2))
    fed = zoo.inputs(whole)
    base = zoo.logits(whole, fed)
    plan = surgery.plan(surgery.parse(f"prune channels {share}"), small)
    assert f"`{'from_pretrained' if said else 'surgery.load'}` builds the new shape" in str(plan)
    surgery.apply(plan, small)
    kept = mask(whole, small)
    width = whole.get_input_embeddings().embedding_dim
    assert len(kept) == width - round(float(share.partition("%")[0]) / 100 * width)
    assert (small.get_output_embeddings().weight is small.get_input_embeddings().weight) == (
        whole.get_output_embeddings().weight is whole.get_input_embeddings().weight
    )
    found, at_zero = zoo.logits(small, fed), zoo.logits(whole, fed)
    report = surgery.verify(small, example_inputs=fed)
    assert report, str(report)
    (finding,) = report.of("shrunk_equals_masked")
    assert not finding.skipped
    if family in EPS:
        assert not finding.told
    else:
        far = relative_error(found, at_zero)
        assert 1e-3 < far < 1
        assert f"of all the output is {far:.2g} off" in str(report)
        look_at(whole, small, kept)
    wanted = zoo.logits(whole, fed)
    rounding = sum(
        relative_error(zoo.logits(model, fed), zoo.logits(copy.deepcopy(model).double(), fed))
        for model in (small, whole)
    )
    assert rounding < 4e-6
    assert relative_error(found, wanted) <= 1e-6 + rounding
    assert not torch.allclose(found, base, atol=1e-3)
    if family != "bert":
        generates_alike(small, whole, fed)
    loaded = loaded_again(small, fed, tmp_path / "out")
    assert (loaded is not None) == said
    if loaded is not None:
        assert loaded.config.hidden_size == len(kept)
        assert loaded.config.rms_norm_eps == pytest.approx(1e-3 * width / len(kept))


class Encoder(nn.Module):
    """Plain torch, norms behind the additions as in BERT, a head behind a projection; nothing goes by the width."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(61, 21), nn.Embedding(16, 21)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(21, 44), "down": nn.Linear(44, 21), "norm": nn.LayerNorm(21)})
            for _ in range(2)
        )
        self.turn, self.last = nn.Linear(21, 21), nn.LayerNorm(21)
        self.head = nn.Linear(21, 61)
        self.head.weight = self.token.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.place(torch.arange(ids.shape[1]))
        for layer in self.layers:
            x = layer["norm"](x + layer["down"](torch.relu(layer["up"](x))))  # type: ignore[index]
        out: Tensor = self.head(self.last(torch.relu(self.turn(x))))
        return out


def encoder() -> Encoder:
    model = Encoder().double().eval()
    zoo.fill(model, 0)
    return model


def test_plain_torch_behind_layer_norms() -> None:
    """Equal to 1e-10 in float64 to norms that look at what is left; how far those of all channels are is told."""
    small, whole = encoder(), encoder()
    surgery.apply(surgery.parse("prune channels 30%"), small, example_inputs=(TOKENS,))
    kept = mask(whole, small)
    assert len(kept) == 21 - 6
    assert small.head.weight is small.token.weight
    assert small.turn.weight.shape == (15, 15)
    far = relative_error(run(small), run(whole))
    look_at(whole, small, kept)
    assert (run(small) - run(whole)).abs().max() < 1e-10
    report = surgery.verify(small, example_inputs=(TOKENS,))
    assert report
    (finding,) = report.of("shrunk_equals_masked")
    assert far > 1e-3
    assert f"{far:.2g} off" in finding.told
    assert finding.to_json()["told"] == finding.told


def test_the_promise_can_fail_behind_layer_norms() -> None:
    model = encoder()
    surgery.apply(surgery.parse("prune channels 30%"), model, example_inputs=(TOKENS,))
    assert surgery.verify(model, example_inputs=(TOKENS,)).of("shrunk_equals_masked")[0].status == "holds"
    model.last.normalized_shape = (5, 3)  # the numbers stay, the shape that it states is another
    model.last.forward = lambda x: F.layer_norm(x, (x.shape[-1],), *model.last.parameters()) * (1 + x.shape[-1])  # type: ignore[method-assign]
    assert surgery.verify(model, example_inputs=(TOKENS,)).of("shrunk_equals_masked")[0].status == "fails"


@pytest.mark.parametrize("name", ["nano", "byhand"])
def test_heads_whose_width_is_worked_out_from_the_stream_are_refused(name: str) -> None:
    """Narrower channels would make narrower heads of them."""
    with pytest.raises(PlanError) as caught:
        surgery.plan(
            surgery.parse("prune channels 30%"), zoo.plain(name, depth=1), example_inputs=(zoo.tokens(51, 2, 6),)
        )
    assert caught.value.diagnostics[0].code == "S332"
    assert "as an attribute" in str(caught.value)


def test_scores_by_what_matters_on_texts(tmp_path: Path) -> None:
    """Sensitivity against a plain reference of its formula, over all that belongs to a channel."""
    calibration = [list(range(3, 14)), [5, 9, 5, 9, 40]]
    path = texts(calibration, tmp_path)
    shape = Shape(bias=True, positions="learned")
    whole, small = decoder("", shape), decoder("", shape)
    program = f'prune channels 25% by sensitivity using "{path}"'
    surgery.apply(surgery.parse(program), small, example_inputs=(TOKENS,))
    total = torch.zeros(32, dtype=torch.float64)
    for ids in calibration:
        whole.zero_grad()
        F.cross_entropy(whole(torch.tensor([ids]))[0, :-1], torch.tensor(ids[1:])).backward()
        taylor = {name: (p * p.grad).abs().detach() for name, p in whole.named_parameters() if p.grad is not None}
        total += weights_by_channel(whole, taylor)
    assert largest(weights_by_channel(whole, magnitudes(whole)), 24) != largest(total, 24)
    assert mask(whole, small) == largest(total, 24)


@pytest.mark.parametrize(
    ("program", "width"),
    [("prune channels 50% round to 8", 16), ("prune channels 40% round to 8 nearest", 16), ("prune channels 0%", 32)],
)
def test_a_multiple_is_left_where_it_is_asked_for(program: str, width: int) -> None:
    model = decoder(program)
    assert model.embed.weight.shape == (61, width)
    assert model.layers[1].ffn.down.out_features == width


class Convolved(nn.Module):
    """Channels are mixed with their neighbours by fixed numbers: no stored matrix says which belong together."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(61, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.head = nn.Linear(16, 61)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + torch.relu(layer(x.roll(1, -1) + x))
        out: Tensor = self.head(x)
        return out


class Inline(Convolved):
    """A norm written into the layer: nothing holds its eps, and its gain is nobody's."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + torch.relu(layer(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)))
        out: Tensor = self.head(x)
        return out


class Headless(Convolved):
    """What comes out is the stream."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return x


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Convolved, "cannot cut what"),
        (Inline, "computes a norm of the channels among other things"),
        (Headless, "cannot narrow the model's output"),
    ],
)
def test_a_stream_that_cannot_be_cut_is_refused_with_the_place(kind: type[nn.Module], said: str) -> None:
    with pytest.raises(PlanError) as caught:
        surgery.plan(surgery.parse("prune channels 25%"), kind(), example_inputs=(TOKENS,))
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == "S135"
    assert said in str(caught.value)
    assert diagnostic.span is not None


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        ("prune channels 99%", "S161", "without channels"),
        ("prune channels 30% round to 16", "S160", "50% (16 stay)"),
        ("prune channels 30% ; prune channels 20% by random", "S103", "prune channels 20% by random"),
    ],
)
def test_shares_that_cannot_be_had_say_what_can(program: str, code: str, said: str) -> None:
    with pytest.raises(PlanError) as caught:
        surgery.plan(surgery.parse(program), decoder(), example_inputs=(TOKENS,))
    assert caught.value.diagnostics[0].code == code
    assert said in str(caught.value)


def test_other_statements_act_on_what_is_left(tmp_path: Path) -> None:
    """With neurons and heads cut as well and an adapter on top: verifies, merges, saves and loads; a second program."""
    lines = ["prune channels 25%", "prune neurons 50% on ffn", "prune heads 50% on attn", "lora rank 2 on all linear"]
    model, other = decoder(" ; ".join(lines)), decoder(" ; ".join(reversed(lines)))
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))
    assert model.get_parameter("layers.1.ffn.down.lora_B").shape == (24, 2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    report = surgery.verify(model, example_inputs=(TOKENS,))
    assert report, str(report)
    assert not report.of("shrunk_equals_masked")[0].skipped
    found = run(model)
    surgery.save(model, tmp_path / "out")
    assert torch.equal(run(surgery.load(tmp_path / "out", model=decoder())), found)
    merged = surgery.merge(model)
    assert (run(merged) - found).abs().max() < 1e-10
    surgery.apply(surgery.parse("prune magnitude 50% on ffn"), merged, example_inputs=(TOKENS,))
    assert int((merged.layers[0].ffn.up.weight == 0).sum()) == 24 * 24 // 2
    assert surgery.verify(merged, example_inputs=(TOKENS,))


def test_experts_are_made_of_the_narrower_blocks() -> None:
    model, narrow = decoder("moe 3 experts on ffn ; prune channels 50%"), decoder("prune channels 50%")
    assert model.layers[0].ffn.router.in_features == 16
    assert (run(model) - run(narrow)).abs().max() < 1e-12


def test_planning_reads_shapes_alone_and_dtypes_and_ties_stay() -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        hollow = AutoModelForCausalLM.from_config(zoo.config("qwen2", num_hidden_layers=2))
    plan = surgery.plan(surgery.parse("prune channels 25%"), hollow)
    assert "20 -> 15 channels" in str(plan)
    assert plan.cost.bytes_after < plan.cost.bytes_before
    assert hollow.model.layers[0].mlp.up_proj.weight.shape == (35, 20)
    model = zoo.tiny("qwen2", dtype=torch.bfloat16, num_hidden_layers=2)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = zoo.logits(model, zoo.padded(model))
    surgery.apply(surgery.parse("prune channels 25%"), model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.layers[0].mlp.up_proj.weight.shape == (35, 15)
    assert not model.model.layers[0].mlp.up_proj.weight.requires_grad
    assert relative_error(zoo.logits(model, zoo.padded(model)), before) > merge_bound(torch.bfloat16) / 100


@pytest.mark.parametrize("program", ["prune channels 25% nearest", "prune channels 50% nearest by random"])
def test_experts_are_cut_with_the_stream(program: str) -> None:
    """Their stacks read and write it, and so does their router; sizes that grouped products cannot take say so."""
    model = surgery.apply(surgery.parse(program), zoo.tiny("qwen2_moe"))
    width = model.model.embed_tokens.weight.shape[1]
    assert width < zoo.config("qwen2_moe").hidden_size
    block = model.model.layers[0].mlp
    assert (
        block.experts.gate_up_proj.shape[-1]
        == block.experts.down_proj.shape[-2]
        == block.gate.weight.shape[-1]
        == width
    )
    report = surgery.verify(model)
    assert report, str(report)
    assert report.of("shrunk_equals_masked")


def test_sizes_that_grouped_products_cannot_take() -> None:
    model = zoo.tiny("mixtral")
    with pytest.raises(surgery.SurgeryError, match=r"S332.* it cannot run .*multiple of 16 bytes"):
        surgery.apply(surgery.parse("prune channels 25%"), model)
