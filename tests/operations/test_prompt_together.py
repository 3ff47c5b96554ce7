"""Prompts in training: in one pass with the tokens where that gives the same, read apart where it would not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from surgery.graph.soft import Front
from tests import studied, zoo
from tests.texts import ids_of

PROGRAM = "prompt 5 init normal"
WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}


def trained(program: str, family: str, **changes: Any) -> Any:
    """In float64: some families amplify the rounding of float32, and only cast to it in their norms."""
    return studied.apply(program, family, zoo.tiny(family, dtype=torch.float64, **changes), ids_of).train()


def front(model: Any) -> Front:
    (found,) = (
        hook for each in model.modules() for hook in each._forward_pre_hooks.values() if isinstance(hook, Front)
    )
    return found


def masks(x: Tensor) -> Tensor:
    """Padding on the left of the first row, on the right of the second."""
    mask = torch.ones_like(x)
    mask[0, :3], mask[1, 5:] = 0, 0
    return mask


def step(model: Any, real: Tensor, apart: bool = False, **given: Any) -> tuple[Tensor, Tensor, bool]:
    """Logits at real tokens, all gradients, and whether it was one pass; `apart`: only two are allowed."""
    hook, together = front(model), front(model).together
    hook.together = None if apart else together
    try:
        logits = model(**given).logits[real.bool()]
        once = bool(hook.reading.waiting)
        model.zero_grad()
        logits.square().sum().backward()
    finally:
        hook.together = together
    return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), once


def assert_alike(one: tuple[Tensor, Tensor, bool], two: tuple[Tensor, Tensor, bool]) -> None:
    for mine, other in zip(one[:2], two[:2], strict=True):
        assert mine.shape == other.shape
        assert other.abs().max() > 0
        assert (mine - other).abs().max() <= 1e-6 * other.abs().max()


@pytest.mark.parametrize(
    "program",
    [
        PROGRAM,
        "ptuning v1 5 via mlp 8\nprefix 3 on all layers\nlora rank 2 on attn.q",
        'prompt 5 init normal\ninstruct "w5 w9" cached',
    ],
    ids=["prompt", "ptuning-prefix-lora", "prompt-cached"],
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma", "opt", "phi3"])
def test_one_pass_gives_what_two_give(family: str, program: str) -> None:
    """Promise: logits and every gradient are the same in one pass and in two, whatever the padding."""
    model, x = trained(program, family), zoo.tokens(50, 3, 8)
    for mask in (torch.ones_like(x), masks(x)):
        one, two = (step(model, mask, apart, input_ids=x, attention_mask=mask) for apart in (False, True))
        assert (one[2], two[2]) == (True, False)
        assert_alike(one, two)


def test_a_window_slides_over_the_rows() -> None:
    """Promise: so where attention has a window that a token's view of the rows moves out of."""
    model, x = trained(PROGRAM, "qwen2", **WINDOW), zoo.tokens(50, 3, 8)
    one, two = (step(model, masks(x), apart, input_ids=x, attention_mask=masks(x)) for apart in (False, True))
    assert (one[2], two[2]) == (True, False)
    assert_alike(one, two)


@pytest.mark.parametrize(
    "program",
    [
        'prompt 5 init normal\ninstruct "w5 w9 w11" cached',
        "ptuning v1 3 via mlp 8\nprompt 2 init normal\nprefix 3 on all layers\nlora rank 2 on attn.q",
        "prompt 2 init normal as b\nprompt 3 init normal as a",
    ],
)
def test_a_window_slides_over_several(program: str) -> None:
    """Promise: the further one is left behind first, in training and in evaluation alike."""
    model, x = trained(program, "qwen2", **WINDOW), zoo.tokens(50, 3, 8)
    mask = masks(x)
    one, two = (step(model, mask, apart, input_ids=x, attention_mask=mask) for apart in (False, True))
    assert (one[2], two[2]) == (True, False)
    assert_alike(one, two)
    evaluated = model.eval()(input_ids=x, attention_mask=mask).logits[mask.bool()].detach()
    assert (evaluated - one[0]).abs().max() <= 1e-6 * evaluated.abs().max()


def test_a_decoder_beside_an_encoder() -> None:
    """Promise: so in a decoder, which reads the encoder's output as well and counts distances."""
    model, x = trained(f"{PROGRAM} in decoder", "t5"), zoo.tokens(50, 3, 8)
    given = {"input_ids": x, "attention_mask": masks(x), "decoder_input_ids": x, "use_cache": False}
    one, two = (step(model, torch.ones_like(x), apart, **given) for apart in (False, True))
    assert (one[2], two[2]) == (True, False)
    assert_alike(one, two)


def test_embeddings_and_token_numbers_are_taken() -> None:
    """Promise: a call with embeddings is as one with their tokens; a text's numbers need no embeddings of ours."""
    model, x = trained(PROGRAM, "llama"), zoo.tokens(50, 3, 8)
    real = torch.ones_like(x)
    embedded = model.get_input_embeddings()(x)
    assert_alike(step(model, real, inputs_embeds=embedded), step(model, real, apart=True, input_ids=x))
    model = trained('instruct "w5 w9 w7"\ntrain norm', "llama")
    one, two = (step(model, real, apart, input_ids=x) for apart in (False, True))
    assert (one[2], two[2]) == (True, False)
    assert_alike(one, two)


@pytest.mark.parametrize(
    "given",
    [
        {"use_cache": True},
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"position_ids": torch.arange(8).expand(3, -1)},
        {"attention_mask": torch.ones(3, 1, 8, 8, dtype=torch.bool).tril()},
    ],
    ids=lambda given: next(iter(given)),
)
def test_what_goes_with_the_tokens_is_read_apart(given: dict[str, Any]) -> None:
    """Promise: a call that asks for, or comes with, more than tokens and padding sees nothing of the rows."""
    model, x = trained(PROGRAM, "llama"), zoo.tokens(50, 3, 8)
    real = torch.ones_like(x)
    one, two = step(model, real, input_ids=x, **given), step(model, real, input_ids=x)
    assert (one[2], two[2]) == (False, True)
    assert_alike(one, two)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_disable`:FutureWarning")
def test_only_training_is_in_one_pass() -> None:
    """Promise: without gradients, in eval mode, or with checkpoints of the model's own, nothing is different."""
    model, x = trained(PROGRAM, "llama"), zoo.tokens(50, 3, 8)
    real = torch.ones_like(x)
    once = step(model, real, input_ids=x)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = step(model, real, input_ids=x)
    model.gradient_checkpointing_disable()
    assert_alike(again, once)
    assert (once[2], again[2]) == (True, False)
    step(model, real, input_ids=x)
    with torch.no_grad():
        model(input_ids=x)
    assert not front(model).reading.waiting


def test_checkpoints_of_the_caller_see_the_same_pass() -> None:
    """Promise: layers that a checkpoint around them runs again, in the backward pass, run as they did."""
    model, x = trained(PROGRAM, "llama"), zoo.tokens(50, 3, 8)
    real = torch.ones_like(x)
    plain = step(model, real, input_ids=x)
    for layer in model.model.layers:
        layer.forward = lambda *args, _of=layer.forward, **kwargs: checkpoint(_of, *args, use_reentrant=False, **kwargs)
    kept = step(model, real, input_ids=x)
    assert kept[2]
    assert_alike(kept, plain)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_loss_counts_the_first_token_in_one_pass_too(family: str) -> None:
    """Promise: the prompt predicts the first token of each row, behind its padding; nothing of the graph is kept."""
    model, x = trained(PROGRAM, family), zoo.tokens(50, 3, 8)
    labels = x.masked_fill(masks(x) == 0, -100)
    given = {"input_ids": x, "attention_mask": masks(x)}
    losses = []
    for apart in (False, True):
        hook, together = front(model), front(model).together
        assert together is not None
        hook.together = None if apart else together
        losses.append(model(**given, labels=labels).loss)
        assert bool(hook.reading.waiting) != apart
        hook.together = together
        assert together.last is None
    assert torch.allclose(*losses, rtol=1e-6)
    logits = model(**given).logits.log_softmax(-1)
    shifted = [-logits[row, i, x[row, i + 1]] for row in range(3) for i in range(7) if min(labels[row, i : i + 2]) >= 0]
    assert (losses[0] - torch.stack(shifted).mean()).abs() > 1e-4  # those alone are not the loss


def test_generation_after_training_reads_the_prompt_anew() -> None:
    """Promise: nothing of a training pass is left; generating is as it would be without it."""
    model, x = trained(PROGRAM, "llama"), zoo.tokens(50, 2, 7)
    fresh = copy.deepcopy(model)
    step(model, torch.ones_like(x), input_ids=x)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.eval().generate(x, **options), fresh.eval().generate(x, **options))


def test_a_second_table_over_the_tokens_is_read_apart() -> None:
    """Promise: placeholders stand for rows in one table only; a model that looks its tokens up twice is read in two."""
    model = zoo.tiny("llama")
    model.model.add_module("beside", torch.nn.Embedding(model.config.vocab_size, 4))
    assert front(studied.apply(PROGRAM, "llama", zoo.tiny("llama"), ids_of)).together is not None
    import surgery

    assert front(surgery.apply(surgery.parse(PROGRAM), model)).together is None
