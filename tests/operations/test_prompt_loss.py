"""The loss behind a prompt is that of its text in front with labels of -100: the first token is predicted too."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery
from tests import studied, zoo
from tests.reference_decoder import ReferenceDecoder, Shape, reference_decoder
from tests.texts import IDS, WAYS, ids_of, in_front, transformed

N = IDS.shape[1]
CAUSAL = ["llama", "gpt2", "gpt_neox", "gemma", "opt"]
HARD = ["instruct", "cached", "prompt"]
TEXTS = {"none": (0, 0, 0), "left": (3, 0, 1), "right": (-3, 0, -1)}


def batch(padding: str) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, mask and labels (3, 7), some in the middle not counted; `TEXTS` says where each row has padding."""
    x, mask = zoo.tokens(50, 3, 7), torch.ones(3, 7, dtype=torch.long)
    for row, width in enumerate(TEXTS[padding]):
        mask[row, slice(width) if width >= 0 else slice(width, None)] = 0
    labels = x.masked_fill(mask == 0, -100)
    labels[1, 2:4] = -100
    return x * mask, mask, labels


def by_hand(model: Any, x: Tensor, mask: Tensor, labels: Tensor, **more: Any) -> Tensor:
    """The loss of the text in front of each row's tokens, behind its padding."""
    rows = []
    for row in zip(x, mask, labels, strict=True):
        left = int((row[1].cumsum(0) == 0).sum())
        fronts = (IDS[0], torch.ones_like(IDS[0]), torch.full_like(IDS[0], -100))
        rows.append([torch.cat((each[:left], own, each[left:])) for each, own in zip(row, fronts, strict=True)])
    ids, seen, wanted = (torch.stack(each) for each in zip(*rows, strict=True))
    positions = (seen.cumsum(-1) - 1).clamp(min=0)
    loss: Tensor = model(input_ids=ids, attention_mask=seen, position_ids=positions, labels=wanted, **more).loss
    return loss


def without_first(logits: Tensor, labels: Tensor) -> Tensor:
    """What a model that does not know of the prompt makes of its logits."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("way", HARD)
@pytest.mark.parametrize("family", CAUSAL)
def test_is_that_of_the_text_in_front(family: str, way: str) -> None:
    """Promise: whatever the padding, with labels of -100 between, and divided as transformers' trainer does."""
    base = zoo.tiny(family)
    model = studied.apply(WAYS[way], family, copy.deepcopy(base), ids_of)
    for padding in TEXTS:
        x, mask, labels = batch(padding)
        for more in ({}, {"num_items_in_batch": 5}, {"num_items_in_batch": torch.tensor(5)}):
            wanted = by_hand(base, x, mask, labels, **more)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            out = model(input_ids=x, attention_mask=mask, position_ids=positions, labels=labels, **more)
            assert out.logits.shape[:2] == x.shape
            assert (out.loss - wanted).abs() <= 2e-6 * wanted
            if not more:
                assert (without_first(out.logits, labels) - wanted).abs() > 1e-4 * wanted
        bare = model(input_ids=x, attention_mask=mask, position_ids=positions).logits
        tokens = mask.bool()
        assert torch.equal(out.logits[tokens], bare[tokens])


@pytest.mark.parametrize("way", HARD)
def test_rows_of_one_token_have_a_loss(way: str) -> None:
    """Promise: one token is predicted from the prompt, where there would be nothing to predict without."""
    base = zoo.tiny("llama")
    model = studied.apply(WAYS[way], "llama", copy.deepcopy(base), ids_of)
    x = zoo.tokens(50, 3, 1)
    wanted = base(input_ids=in_front(x), labels=in_front(x, torch.full_like(IDS, -100))).loss
    loss, logits = model(input_ids=x, labels=x, return_dict=False)[:2]
    assert logits.shape[:2] == x.shape
    assert (loss - wanted).abs() <= 2e-6 * wanted
    with surgery.disabled(model):
        assert model(input_ids=x, labels=x).loss.isnan()


def test_gradients_are_those_of_embeddings_in_front() -> None:
    """Promise: a prompt learns from the first token too, also through checkpoints, compiled, or cast."""
    base = zoo.tiny("llama", dtype=torch.float64)
    model = studied.apply(WAYS["prompt"], "llama", copy.deepcopy(base), ids_of).train()
    (prompt,) = surgery.parameters(model).values()
    x, _, labels = batch("left")
    rows = prompt.detach().clone().requires_grad_()
    words = base.get_input_embeddings()(x)
    front = torch.cat((rows.expand(3, -1, -1), words), 1)[1:2]
    wanted = base(inputs_embeds=front, labels=in_front(labels[1:2], torch.full_like(IDS, -100))).loss
    wanted.backward()
    for prepare in (lambda: None, model.activation_checkpointing_enable):
        prepare()
        prompt.grad = None
        loss = model(input_ids=x[1:2], labels=labels[1:2]).loss
        loss.backward()
        assert (loss - wanted).abs() < 1e-8
        assert (prompt.grad - rows.grad).abs().max() < 1e-7 * rows.grad.abs().max()


def test_of_several_prompts_the_last_predicts(tmp_path: Any) -> None:
    """Promise: what stands right in front of the tokens, kept or trained, copied, or switched off."""
    base, x = zoo.tiny("llama"), zoo.tokens(50, 2, 6)
    for number, (program, text) in enumerate(
        (
            ('instruct "w5 w9" cached; instruct "w33 w12" cached as second', "w5 w9 w33 w12"),
            ('instruct "w5 w9" cached; prompt init text "w33 w12"', "w5 w9 w33 w12"),
            ('prompt init text "w5 w9" as other; instruct "w33 w12"', "w5 w9 w33 w12"),
        )
    ):
        ids = torch.tensor([ids_of(text)])
        wanted = base(input_ids=in_front(x, ids), labels=in_front(x, torch.full_like(ids, -100))).loss
        model = studied.apply(program, "llama", copy.deepcopy(base), ids_of)
        surgery.save(model, tmp_path / str(number))
        for each in (model, copy.deepcopy(model), surgery.load(tmp_path / str(number))):
            assert (each(input_ids=x, labels=x).loss - wanted).abs() <= 2e-6 * wanted
        with surgery.disabled(model):
            assert torch.equal(model(input_ids=x, labels=x).loss, base(input_ids=x, labels=x).loss)


def test_tokens_behind_a_cache_are_counted_as_before() -> None:
    """Promise: what goes on behind tokens has no first token; nor have labels that the caller has shifted."""
    model = studied.apply(WAYS["prompt"], "llama", zoo.tiny("llama"), ids_of)
    x = zoo.tokens(50, 2, 8)
    with torch.no_grad():
        for seen in (x[:, :3], x[:, :1]):
            cache = model(input_ids=seen, use_cache=True).past_key_values
            out = model(input_ids=x[:, 3:], labels=x[:, 3:], past_key_values=cache)
            assert out.logits.shape[1] == 5
            assert (out.loss - without_first(out.logits, x[:, 3:])).abs() < 1e-6
        shifted = F.pad(x, (0, 1), value=-100)[:, 1:].contiguous()
        out = model(input_ids=x, labels=x, shift_labels=shifted)
        assert (out.loss - without_first(out.logits, x)).abs() < 1e-6


def test_labels_of_other_things_are_left_alone() -> None:
    """Promise: classes of rows, classes of tokens, and what a decoder writes have the losses of their logits."""
    from transformers import LlamaForSequenceClassification, LlamaForTokenClassification

    config, x = zoo.tiny("llama").config, zoo.tokens(50, 2, 7)
    config.num_labels, config.pad_token_id = 3, 0
    for kind, labels in (
        (LlamaForSequenceClassification, torch.tensor([1, 2])),
        (LlamaForTokenClassification, x % 3),
        (LlamaForTokenClassification, (x % 3).masked_fill(x % 2 == 0, -100)),
    ):
        model = transformed("prompt 3", kind(config).eval())
        out = model(input_ids=x, labels=labels)
        assert out.logits.shape[:-1] == labels.shape
        assert (out.loss - F.cross_entropy(out.logits.flatten(0, -2), labels.flatten())).abs() < 1e-6
    for program in ("prompt 3", "prompt 3 in decoder"):
        model = studied.apply(program, "t5", zoo.tiny("t5"), ids_of)
        out = model(input_ids=x, labels=x)
        assert out.logits.shape[:2] == x.shape
        assert (out.loss - F.cross_entropy(out.logits.flatten(0, 1), x.flatten())).abs() < 1e-6


class Losing(ReferenceDecoder):
    """A plain torch module that runs its layers and computes its loss in one forward."""

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Any:  # type: ignore[override]
        logits = super().forward(tokens)
        return logits if labels is None else (without_first(logits, labels), logits)


@pytest.mark.parametrize("way", HARD)
@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_plain_modules_with_labels(positions: str, way: str) -> None:
    """Promise: the same of a torch module that takes labels by that name, in float64."""
    base: nn.Module = reference_decoder(Shape(positions=positions))
    base.__class__ = Losing
    x = zoo.tokens(61, 3, 5)
    wanted = base(in_front(x), in_front(x, torch.full_like(IDS, -100)))[0]
    model = transformed(WAYS[way], copy.deepcopy(base), x)
    loss, logits = model(x, labels=x)
    assert logits.shape[:2] == x.shape
    assert (loss - wanted).abs() < 1e-12
    assert (without_first(logits, x) - wanted).abs() > 1e-3


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's compiler, of any hook
def test_compiled_in_one_graph() -> None:
    """Promise: no part of it keeps a model from being compiled."""
    model = studied.apply(WAYS["prompt"], "llama", zoo.tiny("llama"), ids_of)
    x, mask, labels = batch("right")
    given = {"input_ids": x, "attention_mask": mask, "labels": labels}
    wanted = model(**given)
    got = torch.compile(model, fullgraph=True, backend="eager")(**given)
    assert got.logits.shape == wanted.logits.shape
    assert (got.loss - wanted.loss).abs() < 1e-6
