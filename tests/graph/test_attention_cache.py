"""Prefixes that go in through the model's cache, where transformers' attention interface does not reach."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.errors import GraphError, PlanError, SurgeryError
from surgery.graph.attention_cache import behind_padding, distances
from tests import others, studied, zoo
from tests.texts import GENERATIONS, IDS, assert_generates_as_prompted, in_front, padded_rows

BY_TEXT = f'prefix init text "{others.TEXT}"'
OLDER = ("gpt_neox_japanese", "trocr", "rembert", "roformer")


@torch.no_grad()
@pytest.mark.parametrize("name", [*others.BY_CACHE, *OLDER])
def test_text_as_prefix_is_text_as_prompt(name: str) -> None:
    """Promise: soft equals hard, mask, positions and linear biases included, with a cache and without."""
    base, model = others.pair(BY_TEXT, name)
    x = zoo.tokens(60, 2, 7)
    wanted = base(input_ids=in_front(x)).logits[:, IDS.shape[1] :]
    for use_cache in (True, False):
        error = (model(input_ids=x, use_cache=use_cache).logits - wanted).abs().max()
        assert error < 1e-5 * wanted.abs().max()
    assert (base(input_ids=x).logits - wanted).abs().max() > 1e-2 * wanted.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("name", ["falcon", "falcon-alibi"])
def test_eager_where_both_are_there(name: str) -> None:
    """Falcon computes with sdpa or by hand, and hands in its linear bias in two ways."""
    base, model = others.pair(BY_TEXT, name, attn_implementation="eager")
    x = zoo.tokens(60, 2, 7)
    wanted = base(input_ids=in_front(x)).logits[:, IDS.shape[1] :]
    assert (model(input_ids=x).logits - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("how", GENERATIONS)
@pytest.mark.parametrize("name", others.BY_CACHE)
def test_generate_token_for_token(name: str, how: str) -> None:
    """Promise: a batch padded on the left generates what its rows generate when prompted with the text."""
    if how == "static" and name in ("falcon-alibi", "gpt_neo"):
        pytest.skip("the model itself cannot: it fails, or sees other keys than without a static cache")
    base, model = others.pair(BY_TEXT, name)
    assert_generates_as_prompted(model, base, *padded_rows(60), how, 5)


@torch.no_grad()
@pytest.mark.parametrize("program", ["prefix 6", "prefix 6 via mlp 8"])
@pytest.mark.parametrize("name", [*others.BY_CACHE, "mvp"])
def test_off_means_off(name: str, program: str) -> None:
    """Promise: switched off, the base comes back to the bit, cached or not; and the prefix, switched on again."""
    base, model = others.pair(program, name)
    fed = others.inputs(base)
    for use_cache in (True, False):
        on, plain = model(**fed, use_cache=use_cache).logits, base(**fed, use_cache=use_cache).logits
        assert not torch.allclose(on, plain, atol=1e-4)
        with surgery.disabled(model):
            assert torch.equal(model(**fed, use_cache=use_cache).logits, plain)
        assert torch.equal(model(**fed, use_cache=use_cache).logits, on)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("name", [*others.BY_CACHE, "mvp"])
def test_only_the_prefix_is_trained_also_with_checkpointing(name: str) -> None:
    """Promise: gradients reach all of the prefix and nothing else, the same under checkpointing."""
    gradients = []
    for checkpointing in (False, True):
        _, model = others.pair("prefix 5 via mlp 8", name)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        x = others.inputs(model)["input_ids"]
        model(input_ids=x, labels=x, use_cache=False).loss.backward()
        added = surgery.parameters(model)
        assert {n for n, p in model.named_parameters() if p.grad is not None} == set(added)
        gradients.append({name: tensor.grad for name, tensor in added.items()})
    assert all(grad.abs().sum() > 0 for grad in gradients[0].values())
    assert studied.same_gradients(*gradients)


@torch.no_grad()
@pytest.mark.parametrize("name", ["falcon", "bloom", "gptj"])
def test_copies_merges_and_files(name: str, tmp_path: Path) -> None:
    """Promise: a copy is independent, a merge leaves plain keys and values, and a file gives the same bits back."""
    base, model = others.pair("prefix 4 via mlp 8", name)
    fed = others.inputs(base)
    on = model(**fed).logits
    copied = copy.deepcopy(model)
    for parameter in surgery.parameters(copied).values():
        parameter.add_(0.5)
    assert not torch.equal(copied(**fed).logits, on)
    assert torch.equal(model(**fed).logits, on)
    surgery.save(model, tmp_path / "before")
    assert torch.equal(surgery.load(tmp_path / "before")(**fed).logits, on)
    surgery.merge(model)
    assert torch.equal(model(**fed).logits, on)
    assert {n.rpartition(".")[2] for n in surgery.parameters(model)} == {"prefix_key", "prefix_value"}
    surgery.save(model, tmp_path / "after")
    again = surgery.load(tmp_path / "after")
    assert torch.equal(again(**fed).logits, on)
    with surgery.disabled(again):
        assert torch.equal(again(**fed).logits, base(**fed).logits)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["falcon", "bloom", "gptj", "codegen", "mpt"])
def test_every_dtype(name: str, dtype: torch.dtype) -> None:
    """The prefix is kept in float32 over a 16-bit base; the outputs keep the base's dtype, and its sharpness."""
    base, model = others.pair(BY_TEXT, name, dtype=dtype)
    x = zoo.tokens(60, 2, 7)
    wanted, got = base(input_ids=in_front(x)).logits[:, IDS.shape[1] :], model(input_ids=x).logits
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {parameter.dtype for parameter in surgery.parameters(model).values()} == {wide}
    assert got.dtype == dtype
    assert (got - wanted).abs().max() <= 16 * max(torch.finfo(dtype).eps, 1e-8) * wanted.abs().max()
    with surgery.disabled(model):
        for use_cache in (True, False):
            assert torch.equal(
                model(input_ids=x, use_cache=use_cache).logits, base(input_ids=x, use_cache=use_cache).logits
            )


@torch.no_grad()
def test_beside_other_methods_and_on_codes() -> None:
    """Statements meet in a model that is reached through its cache as in any other."""
    program = "prefix 4 as a\nprefix 3 as b\nlora rank 2 on attn.q,v\nprune magnitude 50% on ffn\nquantize ffn nf4"
    _, model = others.pair(program, "gptj")
    _, base = others.pair("prune magnitude 50% on ffn\nquantize ffn nf4", "gptj")
    x = zoo.tokens(60, 2, 7)
    seen = {}
    for wanted in ("a", "b", "a b"):
        surgery.activate(model, *wanted.split())
        seen[wanted] = model(input_ids=x).logits
    assert not any(torch.equal(seen[one], seen[two]) for one, two in (("a", "b"), ("a", "a b"), ("b", "a b")))
    with surgery.disabled(model):
        assert torch.equal(model(input_ids=x).logits, base(input_ids=x).logits)


def test_the_plan_says_which_way() -> None:
    plan = surgery.plan(surgery.parse("prefix 4"), others.tiny("gptj"), anatomy=others.anatomy("gptj"))
    assert "through its cache" in str(plan)
    assert "through its cache" not in str(surgery.plan(surgery.parse("prefix 4"), zoo.tiny("llama")))


def test_a_gate_needs_the_call() -> None:
    with pytest.raises(PlanError, match="S385"):
        surgery.plan(surgery.parse("prefix 4 gated"), others.tiny("bloom"), anatomy=others.anatomy("bloom"))


@torch.no_grad()
def test_an_encoder_that_could_be_a_decoder() -> None:
    """Megatron-BERT reads both ways, and updates a cache only as a decoder: it gets one for its prefix."""
    base, model = others.pair("prefix 4", "megatron-bert")
    x, mask = zoo.tokens(60, 2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, 5:] = 0
    on = model(input_ids=x, attention_mask=mask).logits
    assert (on[0, :5] - model(input_ids=x[:1, :5]).logits[0]).abs().max() < 1e-5 * on.abs().max()
    assert not torch.allclose(on, base(input_ids=x, attention_mask=mask).logits, atol=1e-3)
    with surgery.disabled(model):
        assert torch.equal(model(input_ids=x).logits, base(input_ids=x).logits)


@pytest.mark.parametrize("name", ["deberta_v2", "mpnet", "cpmant"])
def test_models_that_offer_neither_say_so(name: str) -> None:
    """Bad input: no interface, no cache, code that cannot be traced; nothing in the model is changed."""
    model = others.tiny(name)
    before = list(model.state_dict())
    with pytest.raises((GraphError, PlanError), match="S351") as caught:
        others.apply("prefix 4", name, model)
    assert "no cache takes its keys and values" in str(caught.value)
    assert list(model.state_dict()) == before


class Encoder(nn.Module):
    """torch's own layers, whose attention is torch's own module."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(61, 24)
        layers = (nn.TransformerEncoderLayer(24, 4, 20, batch_first=True) for _ in range(2))
        self.layers, self.head = nn.ModuleList(layers), nn.Linear(24, 61)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("program", ["prefix 4", "prefix 4 gated", "ptuning v2 4"])
def test_plain_modules_that_offer_neither_say_so(program: str) -> None:
    """Bad input: torch's own attention cannot be traced; said once, at the statement, with the number of places."""
    model, x = Encoder().eval(), zoo.tokens(61, 2, 5)
    before = list(model.state_dict())
    with pytest.raises(PlanError) as caught:
        surgery.apply(surgery.parse(program), model, example_inputs=(x,))
    (found,) = caught.value.diagnostics
    assert (found.code, found.label) == ("S341", "2 such places")
    assert "MultiheadAttention" in found.message
    assert found.span is not None
    assert list(model.state_dict()) == before


@pytest.mark.parametrize("program", ["prefix 4", "prompt 4", "ptuning v1 4", "ptuning v2 4", 'instruct "w5" tokens 1'])
def test_models_without_attention_say_so(program: str) -> None:
    """Bad input: nothing can come in front where no token attends to another."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(hidden_size=24, num_hidden_layers=2, vocab_size=61, state_size=4, intermediate_size=48)
    with pytest.raises(SurgeryError, match=r"MambaForCausalLM has no .*attention call") as caught:
        surgery.plan(surgery.parse(program), MambaForCausalLM(config))
    (found,) = caught.value.diagnostics
    assert found.code == "S207"
    assert found.span is not None


def test_padding_stays_on_the_left() -> None:
    """Modules that count places: [prefix; padding; tokens] becomes [padding; prefix; tokens], row by row."""
    visible = torch.tensor([[1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 0]], dtype=torch.bool)[:, None, None]
    assert behind_padding(visible, 2).tolist() == [[2, 3, 0, 1, 4, 5], [0, 1, 2, 3, 4, 5]]


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", others.BY_CACHE)
def test_padding_does_not_matter(name: str, side: str) -> None:
    """Promise: a padded row of a batch gives what it gives alone."""
    _, model = others.pair(BY_TEXT, name)
    x, mask = zoo.tokens(60, 2, 9), torch.ones(2, 9, dtype=torch.long)
    seen = slice(5, 9) if side == "left" else slice(0, 4)
    mask[0] = 0
    mask[0, seen] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    takes = "position_ids" in inspect.signature(model.forward).parameters
    got = model(input_ids=x * mask, attention_mask=mask, **({"position_ids": positions} if takes else {})).logits[0]
    alone = model(input_ids=x[:1, seen]).logits[0]
    assert (got[seen] - alone).abs().max() < 1e-5 * alone.abs().max()


def test_linear_bias_goes_on_in_front() -> None:
    """For 3 heads: slopes 2^-4, 2^-8 of the two heads below, then 2^-2 of twice as many."""
    got = distances(3, 4, torch.zeros(1))
    slopes = torch.tensor([2.0**-4, 2.0**-8, 2.0**-2])
    assert torch.equal(got, slopes[:, None] * torch.tensor([-4.0, -3.0, -2.0, -1.0]))
