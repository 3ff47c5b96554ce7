"""Perplexity of a causal model on sequences of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from surgery.errors import PlanError
from surgery.graph.calibration import quiet, read_ids

LEAK = 1e-3  # of the largest logit: what a later token may change at earlier ones, by rounding


def perplexity(model: nn.Module, sequences: Sequence[Tensor]) -> float:
    """e to the mean over all tokens but each sequence's first of -log p(token | those before it).

    sequences: (1, n) ids each, n at least 2. Losses are float32 (float64 of float64 models), their mean float64.
    Errors: PlanError S141 for a model that gives no logits for each token, or sees the token that it predicts.
    """
    device = next(model.parameters()).device
    total, count = 0.0, 0
    check_causal(model, sequences[0])
    with quiet(model):
        for ids in sequences:
            loss, tokens = _loss(_logits(model, ids.to(device)), ids.to(device))
            total, count = total + loss, count + tokens
    mean = total / count
    return math.exp(mean) if mean < 700 else math.inf if not math.isnan(mean) else mean


def _loss(logits: Tensor, ids: Tensor) -> tuple[float, int]:
    """Sum of the losses, and of how many tokens."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    losses = torch.nn.functional.cross_entropy(wide[:-1], ids[0, 1:], reduction="none")
    return float(losses.double().sum()), len(losses)


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    """(n, vocabulary); of a model that puts positions in front, those of the tokens."""
    out = read_ids(model, ids)
    logits = getattr(out, "logits", out)
    logits = logits[0] if isinstance(logits, tuple) else logits
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[1] < ids.shape[1]:
        raise none(type(model).__name__, "gives no logits for each token")
    return logits[0, -ids.shape[1] :]


def check_causal(model: nn.Module, ids: Tensor) -> None:
    """Another last token must leave all earlier logits as they are. ids: (1, n). Errors: PlanError S141."""
    ids = ids.to(next(model.parameters()).device)
    other = ids.clone()
    other[0, -1] = ids[0, 0] if ids[0, 0] != ids[0, -1] else 0 if ids[0, 0] else 1
    with quiet(model):
        one, two = _logits(model, ids)[:-1], _logits(model, other)[:-1]
    if (one - two).abs().max() > LEAK * one.abs().max():
        raise none(type(model).__name__, "sees the token that it would predict")


def none(model: str, why: str) -> PlanError:
    """What is said of a model that has none."""
    return PlanError.of(
        "S141",
        f"{model} {why}: it has no perplexity",
        help="`require perplexity` is for causal language models",
    )
