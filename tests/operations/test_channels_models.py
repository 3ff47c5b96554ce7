"""Channels cut out of transformers' models and of plain encoders: told where norms make what is left unequal."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from surgery.verify.bounds import relative_error
from tests import zoo
from tests.operations.channels import look_at, mask
from tests.operations.cut import TOKENS, generates_alike, loaded_again, run

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
