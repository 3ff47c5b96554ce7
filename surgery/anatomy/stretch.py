"""What lies between two projections, as a function one can run: is it linear, does it mix tokens, which rows gate?"""

from __future__ import annotations

import torch
from torch import fx

from surgery.anatomy.flow import Flow
from surgery.anatomy.probe import Probe, Unknown, gradients
from surgery.anatomy.products import Product, operator_name

TINY = 1e-9
LARGE = 4_000_000
REDUCTIONS = {"mean", "var", "var_mean", "sum", "amax", "linalg_vector_norm", "norm", "std", "max"}


class Stretch:
    """The graph between some projections and the input of another, as a function one can evaluate."""

    def __init__(self, flow: Flow, probe: Probe, down: Product, ups: list[Product]) -> None:
        self.flow, self.probe, self.down, self.ups = flow, probe, down, ups
        self.cuts = self.flow.boundaries | (self.flow.stream - {down.input})
        self.written = self.flow.trace.writes.get((down.node, down.input), [])
        self.base = {up.node: self.probe.random(up.node) for up in ups}
        self.nodes = self.between()
        self.norms: dict[fx.Node, torch.Tensor] = {}
        reductions = [n for n in self.nodes if operator_name(n) in REDUCTIONS]
        for node, value in zip(reductions, self.probe.run(reductions, self.base, self.cuts), strict=True):
            if isinstance(value, torch.Tensor):
                self.norms[node] = value

    def between(self) -> list[fx.Node]:
        inside: set[fx.Node] = set()
        waiting = [self.down.input, *self.written]
        while waiting:
            node = waiting.pop()
            if node in inside or node in self.base or node in self.cuts:
                continue
            inside.add(node)
            waiting.extend(source for source in self.flow.trace.reads[node] if self.flow.reads[source])
        return sorted(inside, key=lambda n: self.flow.trace.order[n])

    def run(self, at: dict[fx.Node, torch.Tensor]) -> torch.Tensor:
        value = self.probe.run([*self.written, self.down.input], {**at, **self.norms}, self.cuts)[-1]
        if not isinstance(value, torch.Tensor):
            raise Unknown(self.down.node.name)
        return value

    def normalises(self) -> bool:
        return any(operator_name(node) in ("softmax", "_softmax") for node in self.nodes)

    def mixes_tokens(self) -> bool:
        """Whether one row of the result depends on more than one token of some source."""
        live = {node: value.clone().requires_grad_() for node, value in self.base.items()}
        value = self.probe.run([*self.written, self.down.input], live, self.cuts)[-1]
        channel = self.down.channel_dimension
        rows = value.movedim(channel, -1).reshape(-1, value.shape[channel])
        for row in (rows[-1], rows[0]):
            grads = gradients([row], list(live.values()), retain=True)
            for up, gradient in zip(self.ups, grads, strict=True):
                if gradient is not None and int((rows_of(up, gradient) != 0).any(dim=1).sum()) > 1:
                    return True
        return False

    def bends(self, up: Product) -> bool:
        """f(a) + f(a + x + y) = f(a + x) + f(a + y) for every f that is affine."""
        a = self.base[up.node]
        x = a.flip(0) * 0.7
        y = a.roll(1, -1) * -1.3
        corners = [self.run({**self.base, up.node: point}) for point in (a, a + x + y, a + x, a + y)]
        bend = (corners[0] + corners[1] - corners[2] - corners[3]).abs().max()
        return bool(bend > TINY * max(float(corner.abs().max()) for corner in corners))

    def affine_channels(self, up: Product) -> torch.Tensor | None:
        """Channels in which the stretch is affine when the others stand still: the rows of `up` in a fused gate-and-up.

        The derivative by an affine channel does not change when that channel moves. The usual layouts (halves, every
        other one) are tried first. For any other, half of the channels are moved at a time, by each bit of their index,
        so that each one moves without its partner at least once.
        """
        width = up.width
        start = self.base[up.node]
        if up.channel_dimension != -1 or start.shape[-1] != width:
            return None

        def slope(point: torch.Tensor) -> torch.Tensor:
            live = point.clone().requires_grad_()
            (gradient,) = gradients([self.run({**self.base, up.node: live})], [live])
            if gradient is None:
                raise Unknown(up.node.name)
            return gradient

        before = slope(start)

        def still(moved: torch.Tensor) -> torch.Tensor:
            after = slope(torch.where(moved, -2.0 * start, start))
            return ((after - before).abs() <= TINY * (1 + before.abs())).reshape(-1, width).all(dim=0)

        index = torch.arange(width)
        for guess in (index >= width // 2, index % 2 == 1):
            for mask in (guess, ~guess):
                if bool(still(mask)[mask].all()) and not bool(still(~mask)[~mask].any()):
                    return mask
        if start.numel() > LARGE:
            return None
        affine = torch.zeros(width, dtype=torch.bool)
        for bit in range((width - 1).bit_length()):
            for side in (0, 1):
                moved = (index >> bit) & 1 == side
                affine |= still(moved) & moved
        return affine


def channel_mask(product: Product, gradient: torch.Tensor) -> torch.Tensor:
    """Which output channels a gradient (of the product's shape) touches."""
    return (rows_of(product, gradient) != 0).any(dim=0)


def rows_of(product: Product, value: torch.Tensor) -> torch.Tensor:
    """(tokens, channels) of a tensor shaped like the product's output."""
    if product.channel_dimension != -1:
        value = value.movedim(product.channel_dimension, -1)
    return value.reshape(-1, product.width)
