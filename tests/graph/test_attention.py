"""Attention sites: reached by interface or by tracing, refused with a reason, and invisible to everything else."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery
from surgery.anatomy.parts import Heads, Part
from surgery.errors import GraphError, SurgeryError
from surgery.graph.attention import AttentionDraft, AttentionSite
from surgery.graph.attention_math import prefixed_mask
from tests import studied, zoo

HEADS = Heads(query=2, key_value=2, key_width=4, value_width=4)


def prefixed(module: nn.Module, positions: int = 3) -> Any:
    """The module with keys and values in front of its attention, which are zero."""
    model = nn.Sequential(module)
    draft = AttentionDraft(module, Part("attn", "attention", "0", heads=HEADS))
    site = AttentionSite(draft, draft.part, "prefix", None, "prefix")
    key = site.parameter("prefix_key", (2, positions, 4), lambda t, g: t.normal_(generator=g))
    value = site.parameter("prefix_value", (2, positions, 4), lambda t, g: t.normal_(generator=g))
    site.put_in_front(key, value, positions)
    draft.install(model)
    return model[0]


class Plain(nn.Module):
    """Two heads of width 4; `_core` is what differs between the variants."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("seen", torch.ones(1, 1, 16, 16).tril())

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.size()
        q, k, v = (each.view(batch, length, 2, 4).transpose(1, 2) for each in self.qkv(x).chunk(3, dim=2))
        return self._core(q, k, v).transpose(1, 2).contiguous().view(batch, length, width)

    def _core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class Causal(Plain):
    def _core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.7)


class DropsInTraining(Plain):
    def _core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5 if self.training else 0.0, is_causal=True)


class ByHand(Plain):
    """As minGPT writes it: a buffer of ones, a scale by the width, dropout."""

    def _core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.size(-2)
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(self.seen[:, :, :length, :length] == 0, float("-inf"))
        return self.dropout(F.softmax(scores, dim=-1)) @ v


class Folded(Plain):
    """Heads folded into the batch, a mask that is added, and a product of batches."""

    def _core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, length, width = q.shape
        q, k, v = (each.reshape(batch * heads, length, width) for each in (q, k, v))
        mask = torch.full((length, length), float("-inf"), device=q.device).triu(1)
        scores = torch.baddbmm if False else torch.bmm(q / 2.0, k.transpose(1, 2)) + mask
        return torch.bmm(scores.softmax(dim=-1), v).view(batch, heads, length, width)


class Capped(Plain):
    """Scores that go through tanh, as Gemma 2 caps them."""

    def _core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.tanh(torch.matmul(q, k.transpose(-2, -1)) / 5.0) * 5.0
        return torch.matmul(torch.softmax(scores, dim=-1), v)


def expected(module: Plain, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What attention with keys and values in front gives, by loops over queries and heads."""
    q, k, v = (each.view(*x.shape[:2], 2, 4).transpose(1, 2) for each in module.qkv(x).split(8, dim=2))
    scale = {Causal: 0.7}.get(type(module), 0.5)
    out = torch.empty_like(q)
    for row in range(x.shape[0]):
        for head in range(2):
            for place in range(x.shape[1]):
                last = x.shape[1] if type(module) in (Plain, Capped) else place + 1
                keys = torch.cat((key[head], k[row, head, :last]))
                scores = keys @ q[row, head, place]
                scores = 5 * torch.tanh(scores / 5) if type(module) is Capped else scores * scale
                out[row, head, place] = scores.softmax(0) @ torch.cat((value[head], v[row, head, :last]))
    return out.transpose(1, 2).reshape(x.shape)


@torch.no_grad()
@pytest.mark.parametrize("kind", [Plain, Causal, DropsInTraining, ByHand, Folded, Capped])
def test_traced_attention_against_loops(kind: type[Plain]) -> None:
    """Promise: the prefix is seen by every query, scaled as the model scales, and masks stay where they were."""
    module = kind().double().eval()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    plain = module(x)
    site = prefixed(copy.deepcopy(module))
    wanted = expected(module, x, site.prefix_key, site.prefix_value)
    assert (site(x) - wanted).abs().max() < 1e-12
    assert (plain - wanted).abs().max() > 1e-2
    site.switch({None})
    assert torch.equal(site(x), plain)


@pytest.mark.parametrize("kind", [DropsInTraining, ByHand])
def test_dropout_follows_the_mode(kind: type[Plain]) -> None:
    """Tracing bakes `self.training` in; the site reads it when it runs."""
    site, x = prefixed(kind()), torch.randn(2, 5, 8)
    site.train()
    assert not torch.equal(site(x), site(x))
    site.eval()
    assert torch.equal(site(x), site(x))


class Branches(Plain):
    def _core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.sum() > 0:
            q = -q
        return F.scaled_dot_product_attention(q, k, v)


class Twice(Plain):
    def _core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v) - F.scaled_dot_product_attention(q, k, -v)


class Linear(Plain):
    def _core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q.softmax(-1) @ (k.softmax(-2).transpose(-2, -1) @ v)


class Learned(Plain):
    def _core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.transpose(-2, -1)) * v.mean(-1, keepdim=True).transpose(-2, -1)
        return scores.softmax(dim=-1) @ v


@pytest.mark.parametrize(("kind", "code"), [(Branches, "S341"), (Twice, "S343"), (Linear, "S34"), (Learned, "S344")])
def test_refusals_name_the_module(kind: type[Plain], code: str) -> None:
    """What cannot be rewritten is refused by name, the line included where tracing stopped, and nothing is changed."""
    module = kind()
    with pytest.raises(GraphError, match=code) as caught:
        prefixed(module)
    message = caught.value.diagnostics[0].message
    assert "0" in message
    assert kind is not Branches or ("Branches" in message and "test_attention.py:" in message)
    assert torch.isfinite(module(torch.randn(1, 3, 8))).all()


def test_mask_that_is_not_given_is_causal_from_the_top_left() -> None:
    """A static cache is longer than its queries at the first call; later keys are not there yet."""
    query, key = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 4, 4)
    mask = prefixed_mask(None, query, key, True, 2)
    assert mask is not None
    assert mask.int().tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]]
    assert prefixed_mask(None, query, key, False, 2) is None
    added = prefixed_mask(torch.full((1, 1, 2, 4), -1.0), query, key, True, 1)
    assert added is not None
    assert added[0, 0].tolist() == [[0.0, -1.0, -1.0, -1.0, -1.0]] * 2
    broadcast = prefixed_mask(torch.zeros(1, 1, 2, 1, dtype=torch.bool), query, key, False, 1)
    assert broadcast is not None
    assert broadcast[0, 0].int().tolist() == [[1, 0, 0, 0, 0]] * 2


@pytest.mark.parametrize("implementation", ["flex_attention", "flash_attention_2"])
def test_implementations_that_hide_their_mask_are_refused(implementation: str) -> None:
    model = zoo.tiny("llama")
    model.config._attn_implementation_internal = implementation
    with pytest.raises(GraphError, match="S340") as caught:
        AttentionDraft(model.model.layers[0].self_attn, Part("attn", "attention", "model.layers.0.self_attn"))
    assert implementation in str(caught.value)
    assert "attn_implementation='sdpa'" in str(caught.value)


@torch.no_grad()
def test_another_model_with_the_same_configuration_is_left_alone() -> None:
    """Promise: nothing else moves; the configuration object is shared by both models."""
    model = zoo.tiny("llama")
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    x = zoo.tokens(50)
    before = other(input_ids=x).logits
    surgery.apply(surgery.parse("prefix 4"), model)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(other(input_ids=x).logits, before)
    assert not torch.equal(model(input_ids=x).logits, before)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_state_dict_keeps_the_base_names(family: str) -> None:
    """Promise: what was there keeps its name and its bits; what is new stands below the attention."""
    model = zoo.tiny(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    surgery.apply(surgery.parse("prefix 4"), model)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    new = set(after) - set(before)
    assert new == set(surgery.parameters(model))
    assert all(".surgery_attention.prefix_" in name for name in new)


@torch.no_grad()
@pytest.mark.parametrize("program", ["prefix 4", "prefix 4 gated", "prefix 4 via mlp 8"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "nano", "byhand"])
def test_copies_are_independent(name: str, program: str) -> None:
    """Promise: copy.deepcopy gives a model of its own: same outputs, own tensors, own switch."""
    specimen = zoo.specimen(name)
    base = specimen.logits()
    model = studied.apply(program, name, specimen.model)
    for parameter in surgery.parameters(model).values():
        parameter.add_(0.3)
    copied = copy.deepcopy(model)
    on = specimen.logits()
    assert torch.equal(zoo.logits(copied, specimen.inputs), on)
    with surgery.disabled(copied):
        assert torch.equal(zoo.logits(copied, specimen.inputs), base)
        assert torch.equal(specimen.logits(), on)
    for parameter in surgery.parameters(copied).values():
        parameter.zero_()
    assert torch.equal(specimen.logits(), on)
    assert not torch.equal(zoo.logits(copied, specimen.inputs), on)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "program"),
    [
        ("llama", "prefix 4"),
        ("byhand", "prefix 4 gated"),
        pytest.param("llama", "prefix 4 gated", marks=pytest.mark.slow),
        pytest.param("gpt2", "prefix 4 via mlp 8", marks=pytest.mark.slow),
        pytest.param("byhand", "prefix 4", marks=pytest.mark.slow),
    ],
)
def test_compiles_in_one_graph(name: str, program: str) -> None:
    """Promise: torch.compile(fullgraph=True) works, with the prefix on and off."""
    specimen = zoo.specimen(name)
    model = studied.apply(program, name, specimen.model)
    for state in (frozenset[str | None](), frozenset({None})):
        with surgery.graph.module.switched(model, state):
            torch._dynamo.reset()
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            assert torch.allclose(zoo.logits(compiled, specimen.inputs), specimen.logits(), atol=1e-6)


@torch.no_grad()
def test_can_be_studied_and_exported_afterwards() -> None:
    """Promise: a transformed model agrees with its own torch.export."""
    model, x = surgery.apply(surgery.parse("prefix 4"), zoo.tiny("llama")), zoo.tokens(50)
    exported = torch.export.export(model, (), {"input_ids": x, "use_cache": False}, strict=False).module()
    assert torch.equal(exported(input_ids=x, use_cache=False).logits, model(input_ids=x).logits)


@torch.no_grad()
def test_causal_models_stay_causal_and_rows_independent() -> None:
    """Promise: a later token changes no earlier logit, and one row of a batch no other."""
    for name in ("llama", "gpt2", "nano", "byhand"):
        specimen = zoo.specimen(name)
        studied.apply("prefix 4", name, specimen.model)
        before = specimen.logits()
        ids = specimen.inputs[0] if isinstance(specimen.inputs, tuple) else specimen.inputs["input_ids"]
        ids[0, -1] += 1
        after = specimen.logits()
        assert torch.allclose(after[0, :-1], before[0, :-1], atol=1e-6)
        assert torch.allclose(after[1], before[1], atol=1e-6)
        assert not torch.allclose(after[0, -1], before[0, -1], atol=1e-3)


def test_unknown_number_of_heads() -> None:
    module = zoo.tiny("llama").model.layers[0].self_attn
    part = Part("attn", "attention", "model.layers.0.self_attn")
    with pytest.raises(SurgeryError, match="S345"):
        AttentionSite(AttentionDraft(module, part), part, "prefix 4", None, "prefix")


class Masked(Plain):
    """Optional arguments that the model passes (a mask), and that it leaves alone."""

    def forward(
        self, x: Tensor, mask: Tensor | None = None, causal: bool = False, scale: float | None = None
    ) -> Tensor:  # type: ignore[override]
        batch, length, width = x.size()
        q, k, v = (each.view(batch, length, 2, 4).transpose(1, 2) for each in self.qkv(x).chunk(3, dim=2))
        if causal:
            assert mask is None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
        return out.transpose(1, 2).reshape(batch, length, width)


class Passing(nn.Module):
    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.masked, self.place = masked, nn.Embedding(20, 8)
        self.layers = nn.ModuleList(Masked() for _ in range(2))
        self.outs = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril() if self.masked else None
        x = x + self.place(torch.arange(x.shape[1], device=x.device))
        for layer, out in zip(self.layers, self.outs, strict=True):
            x = x + out(layer(x, mask=mask))
        return x


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_optional_arguments_are_as_the_model_passes_them(masked: bool) -> None:
    """`if mask is not None` is decided when tracing, so what the model passes is looked at first."""
    model, x = Passing(masked).eval(), torch.randn(2, 5, 8)
    before = model(x)
    surgery.apply(surgery.parse("prefix 3"), model, example_inputs=(x,))
    after = model(x)
    assert not torch.allclose(after, before, atol=1e-3)
    with surgery.disabled(model):
        assert torch.equal(model(x), before)
    changed = x.clone()
    changed[:, -1] += 1
    assert torch.allclose(model(changed)[:, 0], after[:, 0], atol=1e-6) == masked  # the mask still hides what is later
