"""What a norm does to channels, found by running it: is it the same with fewer channels as with those at zero?"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from surgery.anatomy.groups import Norm

CLOSE = 1e-4
"""Relative: many norms compute in float32, whatever they are given."""
SMALL = 1e-2
"""No eps is larger."""


def learn(path: str, module: nn.Module, width: int) -> Norm | None:
    """A norm of `width` channels, from its code and shapes alone; None where a module computes it among other things.

    Fewer channels have a larger mean of squares: sqrt(sum x^2 / kept + eps) is sqrt(width / kept) times what it was,
    eps being width / kept times itself as well, and the gain makes up for it. That holds for a root mean square; the
    mean that a LayerNorm subtracts is another one, and what is left of the error depends on the numbers.
    """
    if next(module.children(), None) is not None:
        return None
    best, least = Norm(path), float("inf")
    try:
        full = _drawn(module)
        gains = list(_gains(full, width))
        for eps, was in _epsilons(module):
            for gain, offset in [*gains, ("", 0.0)]:
                found = Norm(path, gain, offset, eps, was)
                error = _error(full, found, width)
                if error < 0.9 * least:
                    best, least = Norm(path, gain, offset, eps, was, error < CLOSE), error
    except Exception:  # it takes something else than the channels alone, whatever its own code says to that
        return None
    return best


def rescaled(module: nn.Module, norm: Norm, ratio: float) -> None:
    """Let a norm of fewer channels compute what it did of all; 1 / ratio is the inverse.

    ratio: channels before over channels now. The gain is rounded once, in its own dtype. Works on shapes alone too.
    """
    if norm.gain:
        old = module._parameters[norm.gain]
        assert old is not None
        factor = ratio**0.5
        new = (old.detach().double() * factor + (factor - 1) * norm.offset).to(old.dtype)
        module._parameters[norm.gain] = nn.Parameter(new, requires_grad=old.requires_grad)
    if norm.eps:
        dtype = next(iter(module.parameters(recurse=False)), torch.zeros(())).dtype
        was = norm.was or torch.finfo(dtype).eps  # what torch takes for None
        setattr(module, norm.eps, was * ratio if ratio > 1 else norm.was or None)


def _epsilons(module: nn.Module) -> Iterator[tuple[str, float]]:
    for name, value in vars(module).items():
        if type(value) is float and 0 < value < SMALL:
            yield name, value
        elif value is None and name == "eps" and isinstance(module, nn.RMSNorm):
            yield name, 0.0
    yield "", 0.0


def _drawn(module: nn.Module) -> nn.Module:
    """A copy with random float64 weights."""
    made = copy.deepcopy(module).to(torch.float64).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*made.parameters(), *made.buffers()):
            tensor.copy_(1 + 0.3 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    return made


def _gains(full: nn.Module, width: int) -> Iterator[tuple[str, float]]:
    """Parameters that multiply the channels, with what is added to them first."""
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for name in full._parameters:
        tried = copy.deepcopy(full)
        values = []
        for number in (0.0, 1.0):
            with torch.no_grad():
                for other, tensor in tried._parameters.items():
                    if tensor is not None:
                        tensor.fill_(number if other == name else 0.0)
            values.append(_run(tried, x))
        slope = values[1] - values[0]
        if slope.std(0).max() > CLOSE:  # another one for each token: of a bias it is always one
            yield name, round(float((values[0] / slope).median()), 6) + 0.0  # no -0.0


def _error(full: nn.Module, norm: Norm, width: int) -> float:
    """Largest difference between the norm of fewer channels and that of all with the others at zero, relative."""
    kept = torch.arange(width) % 3 != 1
    if not bool(kept.any()) or bool(kept.all()):
        return float("inf")
    x = torch.randn(7, width, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = (x + 0.1) * kept * (norm.was or 1.0) ** 0.5  # small, so that an eps is seen
    wanted = _run(full, x)[:, kept]
    small = copy.deepcopy(full)
    fewer(small, width, int(kept.sum()), kept)
    rescaled(small, norm, width / int(kept.sum()))
    found = _run(small, x[:, kept])
    return float((found - wanted).abs().max() / wanted.abs().max())


def fewer(module: nn.Module, width: int, now: int, kept: Tensor) -> None:
    """Leave these channels of a norm's vectors, and let it state their number."""
    for store in (module._parameters, module._buffers):
        for name, tensor in store.items():
            if tensor is not None and tensor.shape == (width,):
                store[name] = nn.Parameter(tensor.detach()[kept]) if store is module._parameters else tensor[kept]  # type: ignore[assignment]
    for name, value in list(vars(module).items()):
        if value == width and type(value) is int:
            setattr(module, name, now)
        elif value == (width,):
            setattr(module, name, (now,))


@torch.no_grad()
def _run(module: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = module(x)
    return found
