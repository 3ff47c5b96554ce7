"""Soft rows in front of an encoder's tokens are what as many words there would be, and no one else notices them."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import surgery
from surgery.anatomy.parts import Anatomy
from surgery.errors import GraphError, PlanError
from surgery.graph.insertion import Entrance, Insertion
from surgery.graph.insertion_layout import Layout
from tests import zoo

WORDS = torch.tensor([7, 20, 33])
SHAPE = {
    "vocab_size": 58,
    "hidden_size": 24,
    "intermediate_size": 34,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 40,
}
MARKS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertForMaskedLM", SHAPE),
    "bert labels": ("BertConfig", "BertForTokenClassification", {**SHAPE, "num_labels": 5}),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", SHAPE),
    "xlm-roberta": ("XLMRobertaConfig", "XLMRobertaForTokenClassification", SHAPE),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForMaskedLM",
        {"vocab_size": 58, "dim": 24, "hidden_dim": 34, "n_layers": 2, "n_heads": 3, "max_position_embeddings": 40},
    ),
    "electra": ("ElectraConfig", "ElectraForMaskedLM", {**SHAPE, "embedding_size": 15}),
    "albert": ("AlbertConfig", "AlbertForMaskedLM", {**SHAPE, "embedding_size": 15}),
    "mpnet": ("MPNetConfig", "MPNetForMaskedLM", SHAPE),
    "modernbert": ("ModernBertConfig", "ModernBertForMaskedLM", {**SHAPE, **MARKS}),
    "flaubert": (
        "FlaubertConfig",
        "FlaubertWithLMHeadModel",
        {"vocab_size": 58, "emb_dim": 24, "n_layers": 2, "n_heads": 3, "max_position_embeddings": 40, "pad_index": 2},
    ),
    "t5 encoder": (
        "T5Config",
        "T5EncoderModel",
        {"vocab_size": 58, "d_model": 19, "d_kv": 5, "d_ff": 36, "num_layers": 2, "num_heads": 4},
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "vocab_size": 58,
            "d_model": 19,
            "d_kv": 5,
            "d_ff": 36,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
    ),
    "bart": (
        "BartConfig",
        "BartForConditionalGeneration",
        {
            "vocab_size": 58,
            "d_model": 24,
            "encoder_layers": 2,
            "decoder_layers": 3,
            "encoder_ffn_dim": 34,
            "decoder_ffn_dim": 35,
            "encoder_attention_heads": 3,
            "decoder_attention_heads": 4,
            "max_position_embeddings": 40,
            "scale_embedding": True,
        },
    ),
}
DECODING = ("t5", "bart")


def build(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    import transformers

    configuration, model, fields = MODELS[name]
    made = getattr(transformers, configuration)(**fields, **changes)
    for field in vars(made).copy():
        if "dropout" in field and isinstance(getattr(made, field), float):
            setattr(made, field, 0.0)
    with torch.random.fork_rng(devices=[]):
        built = getattr(transformers, model)(made)
    zoo.fill(built, 0)
    return built.to(dtype).eval()


@cache
def anatomy(name: str) -> Anatomy:
    return surgery.study(build(name))


class Soft(nn.Module):
    """Rows that are trained, held by the model itself."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(rows)

    def rows(self) -> Tensor:
        return self.weight


def entrance(name: str, model: nn.Module) -> Entrance:
    found = anatomy(name)
    return Entrance.find(model, found, next(stack for stack in found.stacks if stack.name == "encoder"))


def prompted(name: str, model: nn.Module, words: Tensor = WORDS) -> Insertion:
    """Rows that are the embeddings of words, in front of the model's tokens from now on."""
    at = entrance(name, model)
    with torch.no_grad():
        soft = Soft(model.get_submodule(at.lookup)(words).clone())
    model.add_module("soft", soft)
    insertion = Insertion(at, soft.rows)
    insertion.install(model)
    return insertion


def batch(model: Any, padding: str = "left", length: int = 8, by: int = 3) -> dict[str, Tensor]:
    """Two texts, the first of which is padded."""
    ids = torch.randint(5, 58, (2, length), generator=zoo.seeded(3, "insertion"))
    mask = torch.ones_like(ids)
    place = {"left": slice(0, by), "right": slice(length - by, length), "none": slice(0, 0)}[padding]
    mask[0, place] = 0
    ids[0, place] = model.config.pad_token_id or 0
    fed = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        fed["decoder_input_ids"] = torch.randint(5, 58, (2, 4), generator=zoo.seeded(4, "insertion"))
    return fed


def lefts(mask: Tensor) -> list[int]:
    return [int((row.cumsum(0) == 0).sum()) for row in mask]


def joined(front: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """What a tokenizer makes of texts that begin with more words: padding on the left stays in front of these."""
    rows = [torch.cat([row[:left], front, row[left:]]) for row, left in zip(values, lefts(mask), strict=True)]
    return torch.stack(rows)


def with_words(fed: dict[str, Tensor]) -> dict[str, Tensor]:
    mask = fed["attention_mask"]
    ids = joined(WORDS, fed["input_ids"], mask)
    return {**fed, "input_ids": ids, "attention_mask": joined(torch.ones_like(WORDS), mask, mask)}


def without_words(values: Tensor, mask: Tensor) -> Tensor:
    n = len(WORDS)
    rows = [torch.cat([row[:left], row[left + n :]]) for row, left in zip(values, lefts(mask), strict=True)]
    return torch.stack(rows)


def first(model: nn.Module, fed: dict[str, Any], **more: Any) -> Tensor:
    out: Tensor = model(**fed, **more)[0]
    return out


def close(got: Tensor, want: Tensor, bound: float) -> bool:
    return got.shape == want.shape and bool((got - want).abs().max() <= bound * want.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", list(MODELS))
def test_rows_are_what_words_are(name: str, padding: str) -> None:
    """1e-5 of the largest number in float32, 1e-10 in float64; off, the base to the bit; padding's places left out."""
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        model = build(name, dtype)
        fed = batch(model, padding)
        mask = fed["attention_mask"]
        base, want = first(model, fed), first(model, with_words(fed))
        insertion = prompted(name, model)
        got = first(model, fed)
        real = mask.bool()
        if name in DECODING:
            real = torch.ones(got.shape[:2], dtype=torch.bool)
        else:
            want = without_words(want, mask)
        assert close(got[real], want[real], bound)
        assert not close(got[real], base[real], 1e-3)
        insertion.enabled = False
        assert torch.equal(first(model, fed), base)


@torch.no_grad()
@pytest.mark.parametrize("name", ["roberta", "t5 encoder", "modernbert", "t5"])
def test_the_amount_of_padding_does_not_matter(name: str) -> None:
    """On either side; of models that count positions from the first token or not at all."""
    model = build(name, torch.float64)
    prompted(name, model)
    short = batch(model, "none", length=5)
    want = first(model, short)
    for amount in (1, 6):
        for side in (0, 1):
            parts = {key: value for key, value in short.items() if key != "decoder_input_ids"}
            fill = {"input_ids": model.config.pad_token_id, "attention_mask": 0}
            padding = {key: value.new_full((2, amount), fill[key]) for key, value in parts.items()}
            order = (lambda a, b: [a, b]) if side == 0 else (lambda a, b: [b, a])
            fed = {**short, **{key: torch.cat(order(padding[key], value), 1) for key, value in parts.items()}}
            got = first(model, fed)
            if name not in DECODING:
                got = got[:, amount:] if side == 0 else got[:, :-amount]
            assert close(got, want, 1e-6), (amount, side)  # rotations are computed in float32


@torch.no_grad()
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_positions_and_token_types_of_the_caller(padding: str) -> None:
    """Rows take the first token's position and those after it, and token type zero."""
    model = build("bert", torch.float64)
    fed = batch(model, padding)
    mask = fed["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0) + 2
    types = torch.randint(0, 2, mask.shape, generator=zoo.seeded(1, "types"))
    hard = with_words(fed)
    longer = (hard["attention_mask"].cumsum(1) - 1).clamp(min=0) + 2
    mixed = joined(torch.zeros_like(WORDS), types, mask)
    want = first(model, hard, position_ids=longer, token_type_ids=mixed)
    prompted("bert", model)
    got = first(model, fed, position_ids=positions, token_type_ids=types)
    real = mask.bool()
    assert close(got[real], without_words(want, mask)[real], 1e-10)
    assert not close(got[real], first(model, fed, position_ids=positions)[real], 1e-3)


@torch.no_grad()
def test_positions_for_all_rows_at_once() -> None:
    model = build("bert", torch.float64)
    fed = batch(model, "none")
    prompted("bert", model)
    assert torch.equal(first(model, fed, position_ids=torch.arange(8)[None]), first(model, fed))


@torch.no_grad()
def test_masks_of_every_form() -> None:
    """None, integer, bool, float; of four dimensions as bool or added to scores."""
    model = build("bert", torch.float64)
    fed = batch(model, "right")
    ids, mask = fed["input_ids"], fed["attention_mask"]
    real = mask.bool()
    prompted("bert", model)
    want = model(ids, attention_mask=mask)[0]
    added = torch.zeros(2, 1, 8, 8, dtype=torch.float64).masked_fill(~real[:, None, None], -1e30)
    square = real[:, None, None]
    for form in (real, mask.double(), square, square.expand(2, 1, 8, 8), added):
        assert close(model(ids, attention_mask=form)[0][real], want[real], 1e-8), form.shape
    assert not close(model(ids)[0][real], want[real], 1e-3)
    none = batch(model, "none")
    assert close(model(none["input_ids"])[0], first(model, none), 1e-12)


def test_a_mask_that_cannot_be_extended() -> None:
    model = build("modernbert")
    prompted("modernbert", model)
    fed = batch(model)
    with pytest.raises(GraphError, match="S395"):
        model(fed["input_ids"], attention_mask={"full_attention": None, "sliding_attention": None})
    with pytest.raises(GraphError, match="S395"):
        model(fed["input_ids"], attention_mask=torch.ones(8, 8))
    assert first(model, fed).shape[1] == 8


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "albert", "t5", "bart"])
def test_embeddings_of_the_caller(name: str) -> None:
    model = build(name, torch.float64)
    insertion = prompted(name, model)
    fed = batch(model)
    want = first(model, fed)
    insertion.enabled = False
    embedded = model.get_submodule(insertion.entrance.lookup)(fed.pop("input_ids"))
    insertion.enabled = True
    assert close(first(model, fed, inputs_embeds=embedded), want, 1e-10)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "modernbert", "t5 encoder", "albert"])
def test_hidden_states_keep_the_length(name: str) -> None:
    """All of them, also as a tuple of tuples; attention weights show the rows."""
    model = build(name)
    model.set_attn_implementation("eager")
    prompted(name, model)
    fed = batch(model)
    out = model(**fed, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) >= 3
    assert all(each.shape[1] == 8 for each in out.hidden_states)
    assert all(each.shape[-2:] == (11, 11) for each in out.attentions)
    plain = model(**fed, output_hidden_states=True, return_dict=False)
    assert torch.equal(plain[0], out[0])
    assert all(torch.equal(one, two) for one, two in zip(plain[1], out.hidden_states, strict=True))


@torch.no_grad()
def test_poolers_and_heads_see_the_callers_tokens() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(BertConfig(**SHAPE, num_labels=4)).eval()
    zoo.fill(model, 0)
    found = surgery.study(model)
    fed = batch(model)
    hidden = model.bert(**with_words(fed))[0]
    cls = without_words(hidden, fed["attention_mask"])[:, :1]
    want = model.classifier(model.bert.pooler(cls))
    at = Entrance.find(model, found, found.stacks[0])
    rows = model.get_submodule(at.lookup)(WORDS)
    Insertion(at, lambda: rows).install(model)
    assert close(model(**fed).logits, want, 1e-5)


def test_losses_are_those_of_the_callers_tokens() -> None:
    for name in ("bert", "bert labels"):
        model = build(name)
        prompted(name, model)
        fed = batch(model, "right")
        kinds = 5 if name == "bert labels" else 58
        labels = torch.randint(0, kinds, (2, 8), generator=zoo.seeded(0, "labels"))
        labels[0, 5:] = -100
        out = model(**fed, labels=labels)
        assert torch.allclose(out.loss, F.cross_entropy(out.logits.flatten(0, 1), labels.flatten()))


@pytest.mark.parametrize("name", DECODING)
def test_a_decoder_attends_to_the_rows(name: str) -> None:
    """The encoder's output is longer, may be given back by the caller, and generates what the words would."""
    model = build(name)
    fed = batch(model)
    start = fed.pop("decoder_input_ids")
    ways: list[dict[str, Any]] = [
        {},
        {"num_beams": 3},
        {"use_cache": False},
        {"num_beams": 2, "num_return_sequences": 2},
    ]
    ways = [{"max_new_tokens": 5, "do_sample": False, "min_new_tokens": 5, **way} for way in ways]
    hard = with_words(fed)
    want = [model.generate(**hard, **way) for way in ways]
    base = [model.generate(**fed, **way) for way in ways]
    with torch.no_grad():
        prompted(name, model)
        got = [model.generate(**fed, **way) for way in ways]
        assert all(torch.equal(one, two) for one, two in zip(got, want, strict=True))
        assert not all(torch.equal(one, two) for one, two in zip(got, base, strict=True))
        encoded = model.get_encoder()(**fed)
        assert encoded.last_hidden_state.shape[1] == 8 + len(WORDS)
        once = model(**fed, decoder_input_ids=start).logits
        mask = fed["attention_mask"]
        assert torch.equal(model(encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=start).logits, once)
        again = model.generate(encoder_outputs=encoded, attention_mask=mask, **ways[1])
        assert torch.equal(again, got[1])


def test_no_room_for_positions() -> None:
    """While planning when no token would fit, and when called with too long a text; learned tables start late."""
    model = build("roberta")
    at = entrance("roberta", model)
    assert at.room == 38  # of 40 rows, two are left out
    with pytest.raises(PlanError, match="S393"):
        at.check(38)
    (warning,) = at.check(3)
    assert "35 tokens at most" in warning
    insertion = prompted("roberta", model)
    ids = torch.full((1, 36), 9)
    assert first(model, {"input_ids": ids[:, :35]}).shape[1] == 35
    with pytest.raises(GraphError, match="cut the text to 35 tokens"):
        model(ids)
    insertion.enabled = False
    assert first(model, {"input_ids": ids}).shape[1] == 36
    assert entrance("t5", build("t5")).room is None
    assert entrance("mpnet", build("mpnet")).room == 38  # and not the few rows of its table of distances


@pytest.mark.parametrize("name", ["bert", "modernbert", "albert", "t5", "bart"])
def test_gradients_reach_the_rows(name: str) -> None:
    """The gradient of the words' embeddings, whatever is padded; the base is frozen."""
    model = build(name, torch.float64)
    fed = batch(model)
    at = entrance(name, model)
    model.requires_grad_(False)
    held: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        held.append(output.detach().requires_grad_())
        return held[-1]

    hook = model.get_submodule(at.lookup).register_forward_hook(keep)
    out = first(model, with_words(fed))
    real = torch.ones(out.shape[:2], dtype=torch.bool)
    if name not in DECODING:
        out, real = without_words(out, fed["attention_mask"]), fed["attention_mask"].bool()
    out[real].square().sum().backward()
    hook.remove()
    assert held[0].grad is not None
    places = [held[0].grad[row, left : left + 3] for row, left in enumerate(lefts(fed["attention_mask"]))]
    want = sum(places)
    prompted(name, model)
    first(model, fed)[real].square().sum().backward()
    assert close(model.soft.weight.grad, want, 1e-8)
    assert want.abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "modernbert", "t5"])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    model = build(name, torch.float64)
    prompted(name, model)
    model.requires_grad_(False)
    model.soft.requires_grad_(True)
    fed = batch(model)
    model.train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.soft.weight.grad = None
        first(model, fed, **({"use_cache": False} if name == "t5" else {})).square().sum().backward()
        found.append(model.soft.weight.grad)
    assert close(found[1], found[0], 1e-10)
    assert found[0].abs().max() > 1e-3


def test_dropout_falls_on_rows_as_on_words() -> None:
    model = build("bert", torch.float64, hidden_dropout_prob=0.3)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    model.train()
    fed = batch(model, "right")
    torch.manual_seed(0)
    want = without_words(first(model, with_words(fed)), fed["attention_mask"])
    prompted("bert", model)
    torch.manual_seed(0)
    assert close(first(model, fed), want, 1e-10)


def test_narrow_dtypes() -> None:
    """float32 rows over a bfloat16 base, and autocast over float32: computed in bfloat16, trained in float32."""
    narrow = build("bert", torch.bfloat16)
    prompted("bert", narrow)
    narrow.soft.float()
    fed = batch(narrow)
    out = first(narrow, fed)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert narrow.soft.weight.grad.dtype == torch.float32
    wide = build("bert")
    prompted("bert", wide)
    want = first(wide, fed)
    with torch.autocast("cpu", torch.bfloat16):
        got = first(wide, fed)
    assert got.dtype == torch.bfloat16
    assert close(got.float(), want, 0.1)
    got.float().square().sum().backward()
    assert wide.soft.weight.grad.abs().max() > 0


@torch.no_grad()
def test_copies_have_rows_of_their_own() -> None:
    model = build("bert")
    insertion = prompted("bert", model)
    fed = batch(model)
    want = first(model, fed)
    copied = copy.deepcopy(model)
    assert torch.equal(first(copied, fed), want)
    copied.soft.weight.zero_()
    assert torch.equal(first(model, fed), want)
    assert not torch.equal(first(copied, fed), want)
    insertion.enabled = False
    assert not torch.equal(first(copied, fed), first(model, fed))


@torch.no_grad()
def test_hooks_go_as_they_came() -> None:
    model = build("t5")
    fed = batch(model)
    base = first(model, fed)
    stores = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks")
    insertion = prompted("t5", model)
    insertion.install(model)  # again, as after loading
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == 2
    insertion.remove(model)
    assert not any(getattr(module, store) for module in model.modules() for store in stores)
    assert torch.equal(first(model, fed), base)


@torch.no_grad()
def test_a_call_that_fails_leaves_nothing_behind() -> None:
    model = build("bert")
    insertion = prompted("bert", model)
    fed = batch(model)
    want = first(model, fed)
    with pytest.raises(IndexError):
        model(torch.full((2, 8), 999))
    assert insertion.call is None
    assert torch.equal(first(model, fed), want)


@torch.no_grad()
def test_no_rows_are_none() -> None:
    model = build("bert")
    fed = batch(model)
    base = first(model, fed)
    at = entrance("bert", model)
    for nothing in (None, torch.zeros(0, 24)):
        insertion = Insertion(at, lambda given=nothing: given)
        insertion.install(model)
        assert torch.equal(first(model, fed), base)
        insertion.remove(model)


@torch.no_grad()
def test_rows_that_differ_over_the_batch() -> None:
    model = build("bert", torch.float64)
    at = entrance("bert", model)
    rows = torch.randn(2, 3, 24, dtype=torch.float64, generator=zoo.seeded(0, "rows"))
    chosen = [rows]
    Insertion(at, lambda: chosen[0]).install(model)
    fed = batch(model)
    both = first(model, fed)
    for row in range(2):
        chosen[0] = rows[row]
        assert close(first(model, fed)[row], both[row], 1e-10)


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_compiles_as_one_graph(name: str) -> None:
    model = build(name)
    prompted(name, model)
    fed = batch(model)
    want = first(model, fed)
    want.square().sum().backward()
    gradient, model.soft.weight.grad = model.soft.weight.grad, None
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(**fed)[0]
    assert close(got, want, 1e-5)
    got.square().sum().backward()
    assert close(model.soft.weight.grad, gradient, 1e-4)
    torch._dynamo.reset()


class Block(nn.Module):
    """Attention both ways and a relu network, of plain torch."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.before(x)).split(width, dim=2)
        q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in parts)
        seen = None if mask is None else mask[:, None, None].bool()
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.narrow(F.relu(self.wide(self.after(x))))


class PlainEncoder(nn.Module):
    """Embedding, positions, layers, norm, the mean over tokens and a head, all in one module."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.token, self.place = nn.Embedding(51, 21), nn.Embedding(30, 21)
        self.blocks = nn.ModuleList(Block(21, 3, 33) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(21), nn.Linear(21, 4)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.token(ids) + self.place(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x, mask) if self.reentrant is None else checkpoint(block, x, mask, use_reentrant=self.reentrant)
        self.seen = x
        return self.head(self.norm(x).mean(1))


def plain(reentrant: bool | None = None) -> tuple[PlainEncoder, Insertion]:
    model = PlainEncoder()
    zoo.fill(model, 0)
    model = model.double()
    ids = zoo.tokens(51)
    found = surgery.study(model, (ids, torch.ones_like(ids)))
    model.reentrant = reentrant
    at = Entrance.find(model, found, found.stacks[0])
    with torch.no_grad():
        model.add_module("soft", Soft(model.token(WORDS).clone()))
    insertion = Insertion(at, model.soft.rows)
    insertion.install(model)
    return model, insertion


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 2])
def test_an_encoder_of_plain_torch(padding: int) -> None:
    """The mean over tokens, taken in the same module that embeds them, is over the caller's tokens."""
    model, insertion = plain()
    assert insertion.entrance.leave == "blocks.2"
    ids = zoo.tokens(51)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    insertion.enabled = False
    model(joined(WORDS, ids, mask), joined(torch.ones_like(WORDS), mask, mask))
    hidden = without_words(model.seen, mask)
    insertion.enabled = True
    got = model(ids, mask)
    assert close(got, model.head(model.norm(hidden).mean(1)), 1e-10)
    with pytest.raises(GraphError, match="S393"):
        model(zoo.tokens(51, length=28))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_the_last_layer(reentrant: bool) -> None:
    """The layer runs again when the call is long over, with another call in between, and is cut as it was."""
    ids = zoo.tokens(51)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    found = []
    for way in (None, reentrant):
        model, _ = plain(way)
        model.requires_grad_(False)
        model.soft.requires_grad_(True)
        one = model(ids, mask)
        model(ids[:, :4])
        one.square().sum().backward()
        found.append(model.soft.weight.grad)
    assert close(found[1], found[0], 1e-12)


@torch.no_grad()
def test_torch_s_own_encoder_and_its_padding_mask() -> None:
    """A padding mask is true at padding, so the rows are false in it."""

    class Torch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(24, 3, 40, dropout=0.0, batch_first=True)
            self.token = nn.Embedding(51, 24)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, ids: Tensor, padding_mask: Tensor | None = None) -> Tensor:
            out: Tensor = self.encoder(self.token(ids), src_key_padding_mask=padding_mask)
            return out

    model = Torch().double().eval()
    zoo.fill(model, 0)
    ids = zoo.tokens(51)
    real = torch.ones_like(ids)
    real[0, :3] = 0
    found = surgery.study(model, (ids,))
    want = model(joined(WORDS, ids, real), padding_mask=joined(torch.ones_like(WORDS), real, real) == 0)
    at = Entrance.find(model, found, found.stacks[0])
    rows = model.token(WORDS)
    Insertion(at, lambda: rows).install(model)
    got = model(ids, padding_mask=real == 0)
    assert close(got[real.bool()], without_words(want, real)[real.bool()], 1e-10)


def test_layers_that_shorten_the_sequence() -> None:
    """Said, not computed wrongly."""
    from transformers import FunnelConfig, FunnelForMaskedLM

    shape = {"vocab_size": 58, "d_model": 24, "n_head": 3, "d_head": 8, "d_inner": 34}
    model = FunnelForMaskedLM(FunnelConfig(**shape, block_sizes=[1, 1], num_decoder_layers=1)).eval()
    found = surgery.study(model)
    at = Entrance.find(model, found, found.stacks[0])
    Insertion(at, lambda: torch.zeros(3, 24)).install(model)
    with pytest.raises(GraphError, match="S394"):
        model(**batch(model, "none"))


def test_a_model_without_word_embeddings() -> None:
    model = nn.Sequential(*(Block(21, 3, 33) for _ in range(3)))
    found = surgery.study(model, (torch.randn(2, 5, 21),))
    with pytest.raises(PlanError, match="S394"):
        Entrance.find(model, found, found.stacks[0])


def test_a_study_does_not_see_the_rows() -> None:
    model = build("bert")
    prompted("bert", model)
    again = surgery.study(model)
    assert (again.parts, again.stacks) == (anatomy("bert").parts, anatomy("bert").stacks)


def test_the_order_of_padding_rows_and_tokens() -> None:
    """[padding, rows, tokens] in each row of a batch; cutting undoes it, also of a longer sequence."""
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]])
    layout = Layout.behind(2, 4, mask)
    tokens = torch.arange(12).view(3, 4) + 10
    rows = torch.tensor([[1, 2]])
    put = layout.put(rows, tokens)
    want = [[10, 11, 1, 2, 12, 13], [1, 2, 14, 15, 16, 17], [18, 19, 20, 21, 1, 2]]
    assert put.tolist() == want
    assert torch.equal(layout.cut(put), tokens)
    longer = torch.cat([put, tokens[:, :1]], 1)
    assert torch.equal(layout.cut(longer), torch.cat([tokens, tokens[:, :1]], 1))
    assert layout.replace(rows[..., None] + 5, put[..., None]).squeeze(-1).tolist() == [
        [10, 11, 6, 7, 12, 13],
        [6, 7, 14, 15, 16, 17],
        [18, 19, 20, 21, 6, 7],
    ]
    assert Layout.behind(2, 4, mask == 0, padding=True).left.tolist() == [[2], [0], [4]]  # type: ignore[union-attr]
