"""Projections with a forward of their own, and a small decoder that has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery
from tests import zoo


class InOut(nn.Module):
    """A linear map stored (in, out), as GPT-2's Conv1D holds it; what is done with the product differs below."""

    def __init__(self, inputs: int = 6, outputs: int = 9) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * inputs**-0.5)
        self.bias = nn.Parameter(torch.randn(outputs))
        self.nf = outputs

    def product(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)

    def forward(self, x: Tensor) -> Tensor:
        size = x.size()[:-1] + (self.nf,)  # noqa: RUF005, a traced size cannot be unpacked
        return self.product(x).view(size)


class OneMore(InOut):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Residual(InOut):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class TwiceTheProduct(InOut):
    def product(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight, alpha=2)


class HalfTheBias(InOut):
    def product(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight, beta=0.5)


class FirstFour(InOut):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., :4]


class ByHeads(InOut):
    def forward(self, x: Tensor) -> Tensor:
        return self.product(x).view(x.size(0), x.size(1), 3, 3)


class Matmul(InOut):
    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.weight) + self.bias


class Turned(InOut):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.T, self.bias)


class AtSign(InOut):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class MatmulAlone(InOut):
    def __init__(self, inputs: int = 6, outputs: int = 9) -> None:
        super().__init__(inputs, outputs)
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.weight)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 2, self.bias)


class Cut(nn.Linear):
    """No stored weight gives a map whose entries differ from zero where the factor is zero."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("keep", (torch.arange(outputs * inputs) % 3 > 0).float().view(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.keep, self.bias)


class OfNormOne(nn.Linear):
    """A factor times the weight, but the factor is not the same for another weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / self.weight.norm(), self.bias)


class TimesItsMean(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.weight.mean(), self.bias)


class FunctionalDropout(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(F.linear(x, self.weight, self.bias), 0.5, self.training)


class ChildDropout(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(F.linear(x, self.weight, self.bias))


class Squared(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) ** 2


class PositivePart(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y * (y > 0)


class Squashed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y / (1.0 + y.abs())


class Rectified(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.linear(x, self.weight, self.bias))


FED = (zoo.tokens(51),)


def decoder(make: Callable[[int, int], nn.Module], child: str = "lift", **sizes: Any) -> zoo.PlainDecoder:
    """A small decoder in plain torch in which one projection of every block is another module. float32, eval mode."""
    model = zoo.plain("byhand", dtype=torch.float32, **sizes)
    for number, block in enumerate(model.blocks):
        old = getattr(block, child)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            setattr(block, child, make(old.in_features, old.out_features))
    return model.eval()


def applied(program: str, model: nn.Module) -> Any:
    return surgery.apply(surgery.parse(program), model, example_inputs=FED)
