"""Laws of weights that lose something: zeros and codes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import surgery
from surgery.graph.module import rewritten
from surgery.language.program import Program
from surgery.operations.base import Ratio
from surgery.operations.prune import Prune
from surgery.operations.quantize import Quantize
from surgery.verify.bounds import merge_bound
from tests import strategies, zoo
from tests.properties.case import Case, Law
from tests.properties.drawn import FLOATS, cases, one, quantized
from tests.reference_decoder import ReferenceDecoder


def zeros_are_as_many_as_asked(case: Case) -> None:
    """Counts, positions (the smallest, ties by position), the pattern along the input; what is pruned stays pruned."""
    (statement,) = case.program.statements
    prune: Any = statement.operation
    model = case.build()
    with torch.no_grad():  # ties: weights on a coarse grid, none of them zero
        for parameter in model.parameters():
            parameter.copy_((parameter * 4).round() / 4 + 0.125)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    plan = case.plan()
    surgery.apply(case.program, model, example_inputs=(case.model.tokens,))
    (step,) = plan.steps
    scores: list[Tensor] = []
    zeros: list[Tensor] = []
    for part in step.parts:
        runs = part.channels or ((0, part.shape[0]),)
        rows = torch.cat([torch.arange(start, stop) for start, stop in runs])
        scores.append(before[f"{part.path}.weight"][rows].abs())
        zeros.append(model.get_submodule(part.path).weight[rows] == 0)
    if isinstance(prune.amount, Ratio):
        for score, zero in zip(scores, zeros, strict=True):
            groups = zero.unflatten(-1, (-1, prune.amount.whole))
            assert (groups.sum(-1) == prune.amount.whole - prune.amount.part).all()
            if prune.score == "magnitude":
                of = score.unflatten(-1, (-1, prune.amount.whole))
                cut = of.masked_fill(~groups, 0).amax(-1)
                assert (cut <= of.masked_fill(groups, float("inf")).amin(-1)).all()
        return
    together = prune.global_
    groups_of = [(torch.cat([s.flatten() for s in scores]), torch.cat([z.flatten() for z in zeros]))]
    for score, zero in groups_of if together else zip(scores, zeros, strict=True):
        count = round(prune.amount * score.numel())
        assert int(zero.sum()) == count
        if prune.score == "magnitude":
            smallest = torch.sort(score.flatten(), stable=True).indices[:count]
            wanted = torch.zeros_like(zero.flatten())
            wanted[smallest] = True
            assert torch.equal(zero.flatten(), wanted)


def more_pruning_keeps_the_zeros(case: Case) -> None:
    (statement,) = case.program.statements
    more = replace(statement, operation=replace(statement.operation, amount=0.9))
    less, twice = case.apply(), case.apply(Program((more,), seed=case.program.seed))
    for name, tensor in less.named_parameters():
        assert (twice.get_parameter(name)[tensor == 0] == 0).all(), name
    again = surgery.merge(case.apply())
    surgery.apply(case.program, again, example_inputs=(case.model.tokens,))
    if statement.operation.score == "magnitude":
        assert all(torch.equal(again.get_parameter(name), tensor) for name, tensor in less.named_parameters())


def codes_are_bitsandbytes(case: Case) -> None:
    """Bytes and scales equal bitsandbytes' own for the same weights, pruned first where they are."""
    quantize = next(s.operation for s in case.program.statements if isinstance(s.operation, Quantize))
    prunes = tuple(s for s in case.program.statements if isinstance(s.operation, Prune))
    base = case.apply(Program(prunes, seed=case.program.seed), _uneven(case)) if prunes else _uneven(case)
    model = case.apply(model=_uneven(case))
    places = [path for path, module in rewritten(model) if module.facts is not None]
    assert {ZEROS, HUGE} <= set(places)
    for path in places:
        weight = base.get_parameter(f"{path}.weight").detach()
        codes, absmax, wide = (_in_8_bits if quantize.format == "int8" else _in_4_bits)(weight, quantize)
        module: Any = model.get_submodule(path)
        assert torch.equal(module._parameters["weight_codes"], codes), path
        assert torch.equal(module.weight_absmax, absmax), path
        assert (wide[weight == 0] == 0).all(), "a zero is none after quantization"
        x = torch.randn(3, wide.shape[1], generator=zoo.seeded(0, path), dtype=torch.float64).to(weight.dtype)
        bias = module._parameters.get("bias")
        with surgery.disabled(model), torch.no_grad():
            found = module(x).double()
        wanted = nn.functional.linear(x.double(), wide.double(), None if bias is None else bias.double())
        through = quantize.compute == "fp32" or quantize.format == "int8"  # whose steps are divided in float32
        narrow = torch.float32 if through and weight.dtype == torch.float64 else weight.dtype
        assert (found - wanted).abs().max() <= merge_bound(narrow, 1, 1.0) * max(1.0, wanted.abs().max().item())


ZEROS, HUGE = "layers.0.ffn.up", "layers.0.ffn.down"


@torch.no_grad()
def _uneven(case: Case) -> ReferenceDecoder:
    """The model with a row that is nothing but zeros, and a matrix that float16 does not hold."""
    model = case.build()
    model.get_parameter(f"{ZEROS}.weight")[0] = 0
    huge = model.get_parameter(f"{HUGE}.weight").mul_(1e6)
    assert huge.abs().max() > torch.finfo(torch.float16).max
    return model


def _in_4_bits(weight: Tensor, quantize: Quantize) -> tuple[Tensor, Tensor, Tensor]:
    """bitsandbytes' codes and scales, and what they stand for."""
    import bitsandbytes.functional as bnb

    codes, state = bnb.quantize_4bit(
        (weight.float() if weight.dtype == torch.float64 else weight).contiguous(),
        blocksize=quantize.block,
        compress_statistics=quantize.double,
        quant_type=quantize.format,
    )
    return codes, state.absmax, widened(codes, state)


def _in_8_bits(weight: Tensor, quantize: Quantize) -> tuple[Tensor, Tensor, Tensor]:
    """As `_in_4_bits`; of float16, as bitsandbytes has it, unless that makes infinite what is not.

    bitsandbytes divides by the scale of a row of zeros: what its codes are then is not said. They are zero here.
    """
    import bitsandbytes.functional as bnb

    half = weight.to(torch.float16)
    codes, absmax, _ = bnb.int8_vectorwise_quant(half if half.isfinite().all() else weight.float())
    codes[absmax == 0] = 0
    return codes, absmax, codes.double() * (absmax.double() / 127).unsqueeze(1)


def widened(codes: Tensor, state: Any) -> Tensor:
    """What 4-bit codes stand for, by definition: a table, the high half byte first, one scale for each block.

    (bitsandbytes' own kernel for processors reads wrong scales where rows are shorter than blocks.)
    """
    import bitsandbytes.functional as bnb

    scales = state.absmax
    if state.nested:
        scales = bnb.dequantize_blockwise(scales, state.state2) + state.offset
    count = state.shape.numel()
    indices = torch.stack((codes.flatten() >> 4, codes.flatten() & 15), dim=1).flatten()[:count].long()
    return (state.code[indices] * scales.float().repeat_interleave(state.blocksize)[:count]).view(state.shape)


LAWS: tuple[Law, ...] = (
    Law(
        "zeros",
        "exactly as many zeros as asked, the right ones",
        zeros_are_as_many_as_asked,
        cases(one(strategies.prunes())),
    ),
    Law(
        "monotone",
        "pruning more keeps the zeros, pruning twice is once",
        more_pruning_keeps_the_zeros,
        cases(one(strategies.prunes(ratios=False))),
        2,
    ),
    Law("codes", "bytes of codes are bitsandbytes' own, zeros stay", codes_are_bitsandbytes, cases(quantized, FLOATS)),
)
