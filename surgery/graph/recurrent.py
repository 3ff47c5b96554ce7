"""A recurrent network as a function of its weights, for graphs that hold these as tensors of their own."""

from __future__ import annotations

import torch
from torch import Tensor


def lstm(x: Tensor, hidden: int, *weights: Tensor) -> Tensor:
    """States (n, 2 * hidden) of a two-layer LSTM that reads x (n, width) in both directions, starting from zeros.

    weights: as `torch.nn.LSTM` numbers them; for each layer and direction weight_ih, weight_hh, bias_ih, bias_hh.
    """
    start = x.new_zeros((4, 1, hidden))
    states: Tensor = torch.lstm(x[None], (start, start), weights, True, 2, 0.0, False, True, True)[0]
    return states[0]
