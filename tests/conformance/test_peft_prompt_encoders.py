"""Prompt tuning of encoders is PEFT's where that is right: given the same rows, and without padding."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from tests import zoo

N = 5
SHAPE = {
    "vocab_size": 58,
    "hidden_size": 24,
    "intermediate_size": 34,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 40,
}


def build(family: str) -> Any:
    import transformers

    if family == "t5":
        return zoo.tiny("t5")
    if family == "electra":
        model = transformers.ElectraModel(transformers.ElectraConfig(**SHAPE, embedding_size=15)).eval()
    else:
        model = transformers.BertModel(transformers.BertConfig(**SHAPE)).eval()
    zoo.fill(model, 0)
    return model


def peft_prompt(model: nn.Module, rows: Tensor, task: str) -> nn.Module:
    """PEFT's prompt tuning on a copy, with these rows."""
    from peft import PromptTuningConfig, get_peft_model

    shape = {"num_layers": 3, "token_dim": rows.shape[1], "num_attention_heads": 3, "num_transformer_submodules": 1}
    configuration = PromptTuningConfig(task_type=task, num_virtual_tokens=len(rows), **shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(copy.deepcopy(model), configuration).eval()
    with torch.no_grad():
        adapted.prompt_encoder["default"].embedding.weight.copy_(rows)
    return adapted


@pytest.mark.parametrize("family", ["bert", "electra", "t5"])
def test_rows_in_front_are_peft_s(family: str) -> None:
    """1e-6 of the largest output; PEFT's output of an encoder has the rows' places in it, ours has not."""
    model = build(family)
    width = {"bert": 24, "electra": 15, "t5": 19}[family]
    rows = torch.randn(N, width, generator=zoo.seeded(0, "rows")) * width**-0.5
    fed = zoo.inputs(model)
    peers = peft_prompt(model, rows, "SEQ_2_SEQ_LM" if family == "t5" else "FEATURE_EXTRACTION")
    base = model(**fed)[0]
    want = peers(**fed)[0]
    if family != "t5":
        want = want[:, N:]
    ours = surgery.apply(surgery.parse(f"prompt {N} init normal"), model)
    (trained,) = surgery.parameters(ours).values()
    with torch.no_grad():
        trained.copy_(rows)
    got = ours(**fed)[0]
    assert (got - want).abs().max() <= 1e-6 * want.abs().max()
    assert (got - base).abs().max() > 1e-2 * want.abs().max()
    got.square().sum().backward()
    want.square().sum().backward()
    theirs = peers.prompt_encoder["default"].embedding.weight.grad
    assert (trained.grad - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@torch.no_grad()
def test_left_padding_does_not_come_between_rows_and_tokens() -> None:
    """PEFT puts its rows in front of the padding, so its outputs depend on how much there is; ours do not."""
    model = build("t5")
    rows = torch.randn(N, 19, generator=zoo.seeded(0, "rows")) * 19**-0.5
    fed = zoo.inputs(model)
    far = torch.zeros(2, 9, dtype=torch.long)
    ids, mask = (torch.cat([far, fed[name]], 1) for name in ("input_ids", "attention_mask"))
    padded = {**fed, "input_ids": ids, "attention_mask": mask}
    peers = peft_prompt(model, rows, "SEQ_2_SEQ_LM")
    ours = surgery.apply(surgery.parse(f"prompt {N} init normal"), model)
    (trained,) = surgery.parameters(ours).values()
    trained.copy_(rows)
    assert (peers(**padded)[0] - peers(**fed)[0]).abs().max() > 1e-4  # when this fails, PEFT has been mended
    want = ours(**fed)[0]
    assert (ours(**padded)[0] - want).abs().max() <= 1e-5 * want.abs().max()
