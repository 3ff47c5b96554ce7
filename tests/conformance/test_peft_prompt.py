"""PEFT's prompt tuning and p-tuning with the same parameters: the same logits of the tokens to 1e-6."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from tests import others, studied, zoo

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]
N = 6
CAUSAL = ("llama", "qwen2", "gpt2", "opt", "gpt_neox")


def theirs(base: Any, kind: str) -> Any:
    """PEFT's model with random numbers in what it trains."""
    task = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
    if kind == "prompt":
        config = peft.PromptTuningConfig(num_virtual_tokens=N, task_type=task, prompt_tuning_init="RANDOM")
    else:
        config = peft.PromptEncoderConfig(
            num_virtual_tokens=N,
            task_type=task,
            encoder_reparameterization_type=kind.upper(),
            encoder_hidden_size=9,
            encoder_num_layers=2,
            encoder_dropout=0.0,
            num_transformer_submodules=1,
        )
    if kind == "prompt":
        config.num_transformer_submodules = 1
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    for name, parameter in model.prompt_encoder.named_parameters():
        draw = torch.randn(parameter.shape, generator=zoo.seeded(3, name), dtype=torch.float64)
        parameter.data.copy_(draw * (0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5))
    return model


@torch.no_grad()
def fill(model: Any, encoder: nn.Module, kind: str) -> None:
    """Our tensors from PEFT's."""
    ours = {path.rpartition(".")[2]: tensor for path, tensor in surgery.parameters(model).items()}
    held = dict(encoder.named_parameters())
    if kind == "prompt":
        wanted = {"prompt": held["embedding.weight"]}
    else:
        wanted = {"ptuning_embedding": held["embedding.weight"]}
        linear = {name.split(".")[1]: name.rpartition(".")[0] for name in held if name.startswith("mlp_head")}
        for name, path in zip(("first", "second", "third"), linear.values(), strict=False):
            wanted |= {f"ptuning_{name}_{each}": held[f"{path}.{each}"] for each in ("weight", "bias")}
        wanted |= {
            f"ptuning_lstm_{name.rpartition('.')[2]}": tensor
            for name, tensor in held.items()
            if name.startswith("lstm_head")
        }
    assert {name: tuple(tensor.shape) for name, tensor in wanted.items()} == {
        name: tuple(tensor.shape) for name, tensor in ours.items()
    }
    for name, tensor in ours.items():
        tensor.copy_(wanted[name])


PROGRAMS = {"prompt": f"prompt {N}", "mlp": f"ptuning v1 {N} via mlp 9", "lstm": f"ptuning v1 {N} via lstm 9"}


def close(got: Tensor, wanted: Tensor) -> bool:
    return bool((got - wanted).abs().max() <= 1e-6 * wanted.abs().max())


def same_gradients(model: Any, other: Any) -> bool:
    """Of what a prompt is made of, to 1e-5 of the largest, which is not zero."""
    wanted = other.prompt_encoder["default"].embedding.weight.grad
    ours = next(t for path, t in surgery.parameters(model).items() if path.endswith(("prompt", "embedding")))
    return bool(wanted.abs().max() > 0 and (ours.grad - wanted).abs().max() <= 1e-5 * wanted.abs().max())


@pytest.mark.parametrize("kind", PROGRAMS)
@pytest.mark.parametrize("family", CAUSAL)
def test_same_logits_and_gradients(family: str, kind: str) -> None:
    """Promise: PEFT's logits behind its prompt, and its gradients; padding on the right."""
    base = zoo.tiny(family)
    other, x = theirs(base, kind), zoo.tokens(50, 2, 7)
    model = studied.apply(PROGRAMS[kind], family, base)
    fill(model, other.prompt_encoder["default"], kind)
    mask = torch.ones_like(x)
    mask[0, 5:] = 0
    wanted = other(input_ids=x, attention_mask=mask).logits[:, N:]
    got = model(input_ids=x, attention_mask=mask).logits
    assert close(got[1], wanted[1])
    assert close(got[0, :5], wanted[0, :5])
    wanted[1].square().sum().backward()
    got[1].square().sum().backward()
    assert same_gradients(model, other)


@pytest.mark.parametrize("kind", PROGRAMS)
@pytest.mark.parametrize("family", CAUSAL)
def test_same_loss(family: str, kind: str) -> None:
    """Promise: PEFT's loss and its gradients, with padding on the right, labels that are not counted, and one token."""
    base = zoo.tiny(family)
    other, x = theirs(base, kind), zoo.tokens(50, 2, 7)
    model = studied.apply(PROGRAMS[kind], family, base)
    fill(model, other.prompt_encoder["default"], kind)
    mask = torch.ones_like(x)
    mask[0, 5:] = 0
    labels = x.masked_fill(mask == 0, -100)
    labels[1, 2:4] = -100
    for given in (
        {"input_ids": x, "attention_mask": mask, "labels": labels},
        {"input_ids": x, "attention_mask": mask, "labels": labels, "num_items_in_batch": 7},
        {"input_ids": x[:, :1], "attention_mask": mask[:, :1], "labels": x[:, :1]},
    ):
        wanted, got = other(**given).loss, model(**given).loss
        assert (got - wanted).abs() <= 1e-6 * wanted
    wanted.backward()
    got.backward()
    assert same_gradients(model, other)


@torch.no_grad()
@pytest.mark.parametrize("kind", PROGRAMS)
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_same_logits_in_an_encoder(family: str, kind: str) -> None:
    """Promise: PEFT's logits of an encoder-decoder whose encoder has the prompt."""
    base = zoo.tiny(family) if family == "t5" else others.tiny(family)
    other, x = theirs(base, kind), zoo.tokens(50, 2, 7)
    model = surgery.apply(surgery.parse(PROGRAMS[kind]), base)
    fill(model, other.prompt_encoder["default"], kind)
    mask = torch.ones_like(x)
    given = {"input_ids": x, "attention_mask": mask, "decoder_input_ids": x[:, :4]}
    assert close(model(**given).logits, other(**given).logits)


@torch.no_grad()
def test_left_padding_changes_their_output_and_not_ours() -> None:
    """Promise: the prompt stands right before the tokens, not before the padding, and positions go on from it."""
    base = zoo.tiny("llama")
    other, x = theirs(base, "prompt"), zoo.tokens(50, 1, 7)
    model = studied.apply(PROGRAMS["prompt"], "llama", base)
    fill(model, other.prompt_encoder["default"], "prompt")
    mask = torch.ones(1, 10, dtype=torch.long)
    mask[:, :3] = 0
    padded = {"input_ids": torch.cat((x[:, :3] * 0, x), 1), "attention_mask": mask}
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    wanted = model(input_ids=x).logits
    assert close(model(**padded, position_ids=positions).logits[:, 3:], wanted)
    assert not close(other(**padded).logits[:, N + 3 :], other(input_ids=x).logits[:, N:])
