"""Laws of statements that change the model itself: layers in another order, experts made of feed-forward blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

import surgery
from surgery.graph.experts import MixtureOfExperts, mixtures
from surgery.language import parse
from tests import zoo
from tests.properties.case import Law
from tests.properties.drawn import cases

if TYPE_CHECKING:
    from surgery.language.program import Program
    from tests.properties.case import Case
    from tests.strategies import Model


def depths(model: Model) -> st.SearchStrategy[Program]:
    """Some layers repeated or, of several, one left out; another statement beside it."""
    runs = st.tuples(st.integers(0, model.layers - 1), st.integers(0, model.layers - 1)).map(sorted)
    texts = runs.map(lambda run: "repeat layers {}..{}".format(*run)) | runs.map(
        lambda run: "repeat layers {}..{} silent".format(*run)
    )
    if model.layers > 1:
        texts |= st.integers(0, model.layers - 1).map("drop layers {}".format)
    return texts.map(lambda text: parse(f"{text} ; lora rank 1 on attn.q"))


def upcyclings(model: Model) -> st.SearchStrategy[Program]:
    """Mixtures in all layers."""
    sizes = st.tuples(st.integers(1, 4), st.integers(1, 4))
    return sizes.map(lambda pair: parse(f"moe {max(pair)} experts top {min(pair)} balance 0.5 z 0.25 on ffn"))


def layers_are_those_asked_for(case: Case) -> None:
    """Against the same layers lined up by hand; silent copies leave every bit."""
    model, by_hand = case.apply(), case.build()
    (said,) = (each for each in case.program.statements if each.operation.verb in ("drop", "repeat"))
    depth = len(by_hand.layers)
    first, last = (getattr(said.selector, end) for end in ("first", "last"))
    chosen = range(first, (first if last is None else last) + 1)
    silent = getattr(said.operation, "silent", False)
    if said.operation.verb == "drop":
        order = [index for index in range(depth) if index not in chosen]
    else:
        order = [*range(chosen[-1] + 1), *(() if silent else chosen), *range(chosen[-1] + 1, depth)]
    by_hand.layers = nn.ModuleList([by_hand.layers[index] for index in order])
    assert len(model.layers) == len(order) + (len(chosen) if silent else 0)
    assert torch.equal(case.run(model), case.run(by_hand))
    assert model.layers[-1] is not model.layers[0] or len(model.layers) == 1
    assert {int(name.split(".")[1]) for name in surgery.parameters(model)} == set(range(len(model.layers)))
    assert len({id(tensor) for tensor in model.parameters()}) == len(list(model.parameters()))


def mixtures_mean_their_formula(case: Case) -> None:
    """At first the model is as it was; with experts that differ each block is the sum that the paper writes."""
    model, base = case.apply(), case.build()
    assert torch.allclose(case.run(model), case.run(base), rtol=1e-11, atol=1e-11)
    found = dict(mixtures(model))
    assert found
    for path, module in found.items():
        block = base.get_submodule(path)
        with torch.no_grad():
            for name, tensor in module.named_parameters():
                tensor += 0.5 * torch.randn(tensor.shape, generator=zoo.seeded(1, f"{path}.{name}"), dtype=tensor.dtype)
            x = torch.randn(11, module.router.in_features, generator=zoo.seeded(2, path), dtype=torch.float64)
            assert torch.allclose(module(x), _formula(module, block, x), rtol=1e-10, atol=1e-10)
        module.train()(x.requires_grad_())
        assert module.loss is not None
        assert torch.allclose(module.loss, _losses(module, x), rtol=1e-10)


def _formula(module: MixtureOfExperts, block: nn.Module, x: Tensor) -> Tensor:
    logits = F.linear(x, module.router.weight)
    rows = []
    for token, scores in zip(x, logits, strict=True):
        best = scores.argsort(descending=True)[: module.routing.top]
        weights = scores[best].exp() / scores[best].exp().sum()
        given = []
        for expert in best:
            for name, tensor in block.named_parameters():
                tensor.copy_(module.experts.get_parameter(name)[expert])
            given.append(block(token.view(1, 1, -1)).flatten())
        rows.append(sum(w * y for w, y in zip(weights, given, strict=True)))
    return torch.stack(rows)  # type: ignore[arg-type]


def _losses(module: MixtureOfExperts, x: Tensor) -> Tensor:
    """E sum f P, with f counted token by token, and the mean squared logarithm of the partition function."""
    logits = F.linear(x, module.router.weight)
    count = module.routing.experts
    f = torch.zeros(count, dtype=logits.dtype)
    for scores in logits:
        f[scores.argsort(descending=True)[: module.routing.top]] += 1 / (len(x) * module.routing.top)
    p = (logits.exp() / logits.exp().sum(1, keepdim=True)).mean(0)
    z = logits.exp().sum(1).log().square().mean()
    return module.routing.balance * count * (f * p).sum() + module.routing.z * z


LAWS: tuple[Law, ...] = (
    Law(
        "layers",
        "layers are those asked for, silent ones change nothing",
        layers_are_those_asked_for,
        cases(depths),
    ),
    Law(
        "experts",
        "mixtures are their formula, and unchanged at first",
        mixtures_mean_their_formula,
        cases(upcyclings),
    ),
)
