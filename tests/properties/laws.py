"""The laws as one table: what each says, which programs it is tried on, and how it is checked.

A check takes one case and asserts. The suite draws cases by Hypothesis; the table of planted bugs runs the same checks
on one case each, and every bug must make the law that it names fail.
"""

from __future__ import annotations

import copy
import json
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import surgery
from surgery.compiler.plan import Plan
from surgery.graph.module import Rewritten, rewritten
from surgery.language.program import Program, Statement
from surgery.language.selector import Role, Union
from surgery.operations.adapter import Adapter
from surgery.operations.base import Operation, Ratio, Variant
from surgery.operations.freeze import Freeze
from surgery.operations.ia3 import Ia3
from surgery.operations.instruct import Instruct
from surgery.operations.lora import Lora
from surgery.operations.optimize import Optimize
from surgery.operations.prefix import Prefix
from surgery.operations.prompt import Prompt
from surgery.operations.prune import Prune
from surgery.operations.ptuning import Ptuning
from surgery.operations.quantize import Quantize
from surgery.operations.sparse import Sparse
from surgery.operations.train import Train
from surgery.verify.bounds import merge_bound
from tests import strategies, zoo
from tests.properties import dynamic, hand, requiring, reshaping
from tests.reference_decoder import ReferenceDecoder
from tests.strategies import Model


@dataclass(frozen=True)
class Case:
    """A model to be built, and a program for it."""

    model: Model
    program: Program

    def build(self) -> ReferenceDecoder:
        return self.model.build()

    def apply(self, program: Program | None = None, model: nn.Module | None = None) -> Any:
        """A fresh model under the program."""
        return surgery.apply(
            self.program if program is None else program,
            self.build() if model is None else model,
            example_inputs=(self.model.tokens,),
            tokenizer=zoo.tokenizer(self.model.shape.vocabulary),
        )

    def plan(self, program: Program | None = None, model: nn.Module | None = None) -> Plan:
        return surgery.plan(
            self.program if program is None else program,
            self.build() if model is None else model,
            example_inputs=(self.model.tokens,),
            tokenizer=zoo.tokenizer(self.model.shape.vocabulary),
        )

    def run(self, model: nn.Module, tokens: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            return model(self.model.tokens if tokens is None else tokens)

    def has(self, *operations: type) -> bool:
        return any(isinstance(statement.operation, operations) for statement in self.program.statements)


@dataclass(frozen=True)
class Law:
    """name: what bugs refer to. says: the law. cases: where it is tried. cost: 1, or more for slow checks."""

    name: str
    says: str
    check: Callable[[Case], None]
    cases: st.SearchStrategy[Case] = field(repr=False)
    cost: int = 1


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Random values for everything trained, as large as the base; they come back too."""
    tensors = surgery.parameters(model)
    for name, parameter in tensors.items():
        draw = torch.randn(parameter.shape, generator=zoo.seeded(seed, name), dtype=torch.float64)
        if "magnitude" in name or "ia3" in name or name.endswith((".weight", ".bias")):
            # Norms and factors are about what they start as, and so are the base's own tensors, whose zeros stay.
            parameter.mul_((1 + 0.2 * draw).to(parameter.dtype))
        else:
            parameter.copy_(draw * (parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0))
    return tensors


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor, copied."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Checks


def prints_and_parses(case: Case) -> None:
    assert surgery.parse(str(case.program)) == case.program
    assert str(surgery.parse(str(case.program))) == str(case.program)


def comments_stay(case: Case) -> None:
    from surgery.language import format_text

    lines = [f"{line}   #  note {number}" for number, line in enumerate(str(case.program).splitlines())]
    text = format_text("\n".join(["# first", *lines, "# last"]))
    for number in range(len(lines)):
        assert f"note {number}" in text
    assert text.startswith("# first")
    assert "# last" in text
    assert format_text(text) == text
    assert surgery.parse(text) == case.program


def errors_point_at_the_place(case: Case) -> None:
    text = str(case.program)
    start = text.index(" on ") + 1
    broken = text[:start] + "onn" + text[start + 2 :]
    with pytest.raises(surgery.SurgeryError) as refused:
        surgery.parse(broken, name="p")
    spans = [each.span for each in refused.value.diagnostics]
    assert all(span is not None and 0 <= span.start <= span.stop <= len(broken) for span in spans)
    line, column = broken[:start].count("\n") + 1, start - (broken.rfind("\n", 0, start) + 1) + 1
    assert any(str(span) == f"p:{line}:{column}" for span in spans), f"none at {line}:{column}"


def defaults_are_the_papers(case: Case) -> None:
    """Facts written by hand: what a short statement means."""
    (lora, quantize, prefix) = (
        statement.operation
        for statement in surgery.parse("lora rank 8 on attn.q\nquantize base nf4\nprefix 20 on all layers").statements
    )
    assert (lora.rank, lora.alpha, lora.dropout, lora.init, lora.scale, lora.dora) == (
        8,
        8,
        0,
        "kaiming",
        "alpha",
        False,
    )
    assert (quantize.format, quantize.double, quantize.block, quantize.compute) == ("nf4", False, 64, "input")
    assert (prefix.positions, prefix.via, prefix.gated, prefix.init) == (20, None, False, None)


def conflicts_are_refused(case: Case) -> None:
    """Two statements that cannot commute: an error that names both."""
    pairs = (
        "quantize ffn fp4\nquantize base nf4",
        "lora rank 1 on attn.q\nlora rank 2 on attn.q,v",
        "ia3\nia3 on attn.q,v",
        "quantize base nf4\ntrain all layers",
        "optimize adamw lr 0.1\noptimize sgd lr 0.1",
        "train ffn\nfreeze ffn",
    )
    for pair in pairs:
        program = surgery.parse(pair)
        with pytest.raises(surgery.SurgeryError) as refused:
            case.plan(program)
        assert all(str(statement) in str(refused.value) for statement in program.statements)


def plans_are_reproducible(case: Case) -> None:
    first = json.dumps(case.plan().to_json())
    assert json.dumps(case.plan().to_json()) == first
    steps = json.loads(first)["steps"]
    permuted = Program(tuple(reversed(case.program.statements)), seed=case.program.seed)
    assert json.loads(json.dumps(case.plan(permuted).to_json()))["steps"] == steps


def plans_count_what_changes(case: Case) -> None:
    plan = case.plan()
    model = case.apply()
    parts = [part for step in plan.steps for part in step.parts if step.operation.rewrites(part)]
    paths = {part.path for part in parts}
    if any(part.kind == "entry" for part in parts):  # what comes in front of the tokens is read at every attention call
        paths |= {part.path for part in plan.anatomy.parts if part.kind == "attention"}
    assert {path.removesuffix(".surgery_edge").removeprefix("surgery_prompt") for path, _ in rewritten(model)} == paths
    told = {id(tensor): tensor.numel() for tensor in model.parameters() if tensor.requires_grad}
    assert sum(tensor.numel() for tensor in surgery.parameters(model).values()) == sum(told.values())
    sparse = [step.parts for step in plan.steps if isinstance(step.operation, Sparse)]
    zeros = sum(int((model.get_parameter(f"{part.path}.weight") == 0).sum()) for parts in sparse for part in parts)
    assert sum(told.values()) - zeros == plan.cost.trainable
    for step in plan.steps:
        if not any(part.kind == "attention" for part in step.parts) and step.operation.granularity == "part":
            wanted = hand.spots(step.statement.selector, case.model.shape)
            if isinstance(step.operation, Adapter):
                wanted = {(layer, role.partition(".")[0]) for layer, role in wanted}
            found = {(part.layer, part.role) for part in step.parts}
            assert found == wanted, "a selector finds other places than it says"


def order_means_nothing(case: Case) -> None:
    model = case.apply()
    statements = list(case.program.statements)
    random.Random(len(statements)).shuffle(statements)
    permuted = Program(tuple(reversed(statements)), seed=case.program.seed)
    other = case.apply(permuted)
    assert same(bits(model), bits(other))
    assert torch.equal(case.run(model), case.run(other))


def seeds_tell_tensors_apart(case: Case) -> None:
    tensors = [t for name, t in surgery.parameters(case.apply()).items() if "lora_A" in name]
    for index, one in enumerate(tensors):
        for other in tensors[index + 1 :]:
            assert one.shape != other.shape or not torch.equal(one, other), "two places drew the same numbers"
    reseeded = case.apply(Program(case.program.statements, seed=case.program.seed + 1))
    others = [t for name, t in surgery.parameters(reseeded).items() if "lora_A" in name]
    assert all(not torch.equal(one, other) for one, other in zip(tensors, others, strict=True))


def identity_at_the_start(case: Case) -> None:
    model = case.apply()
    on = case.run(model)
    with surgery.disabled(model):
        assert torch.equal(case.run(model), on)
    if not case.has(Prune, Sparse, Quantize):
        assert torch.equal(case.run(case.build()), on)
    before = on
    randomise(model)
    assert not torch.equal(case.run(model), before), "what was attached has no effect"


def off_means_off(case: Case) -> None:
    model = case.apply()
    randomise(model)
    on = case.run(model)
    with surgery.disabled(model):
        off = case.run(model)
    assert not torch.equal(on, off)
    assert torch.equal(case.run(model), on)
    base = [s for s in case.program.statements if isinstance(s.operation, Prune | Sparse | Quantize | Train | Freeze)]
    alone = case.apply(Program(tuple(base), seed=case.program.seed)) if base else case.build()
    with torch.no_grad():  # what is trained of the base stays as trained
        for name, tensor in surgery.parameters(alone).items():
            tensor.copy_(surgery.parameters(model)[name])
    assert torch.equal(case.run(alone), off)


def adapters_mean_their_formula(case: Case) -> None:
    """The whole model against a plain one whose weights were computed by hand from the paper."""
    model = case.apply()
    tensors = randomise(model)
    wanted = case.run(hand.adapted(case.build(), case.program, tensors))
    error = (case.run(model) - wanted).abs().max() / wanted.abs().max()
    depth = 7 * case.model.layers
    assert error <= merge_bound(torch.float64, depth, 16.0), f"off by {error:.1e}"


def bottlenecks_mean_their_formula(case: Case) -> None:
    """Adapters against sub-layers with the networks around them, written out; twice, for what is kept in between."""
    model = case.apply()
    written = hand.narrowed(case.build(), case.program, randomise(model))
    for tokens in (case.model.tokens, case.model.tokens.flip(1)):
        wanted = case.run(written, tokens)
        error = (case.run(model, tokens) - wanted).abs().max() / wanted.abs().max()
        bound = merge_bound(torch.float64, 7 * case.model.layers, 64.0)
        assert error <= bound, f"off by {error:.1e}"
    assert not torch.equal(case.run(case.build(), tokens), wanted)


def merging_changes_nothing(case: Case) -> None:
    model = case.apply()
    randomise(model)
    wanted = case.run(model)
    with surgery.disabled(model):
        assert not torch.equal(case.run(model), wanted)
    places = sum(1 for _ in rewritten(model))
    dtype = strategies.DTYPES[case.model.dtype]
    merged = surgery.merge(model)
    assert not list(rewritten(merged))
    assert merged.state_dict().keys() == case.build().state_dict().keys()
    error = ((case.run(merged) - wanted).abs().max() / wanted.abs().max()).item()
    assert error <= merge_bound(dtype, max(places, 1), 16.0), f"off by {error:.1e}"


def merged_weights_mean_their_formula(case: Case) -> None:
    """Folded weights and biases against W + s B A by hand, tensor by tensor."""
    model = case.apply()
    tensors = {name: tensor.detach().clone() for name, tensor in randomise(model).items()}
    wanted = hand.adapted(case.build(), case.program, tensors).state_dict()
    found = surgery.merge(model).state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.allclose(found[name], tensor, rtol=0, atol=1e-12 * max(1.0, tensor.abs().max().item())), name


def factors_mean_their_formula(case: Case) -> None:
    """IA3 and added biases against a plain model whose weights were computed by hand, whole and merged."""
    model = case.apply()
    tensors = randomise(model)
    wanted = case.run(hand.rescaled(case.build(), case.program, tensors))
    bound = merge_bound(torch.float64, 7 * case.model.layers, 16.0)
    for each in (model, surgery.merge(copy.deepcopy(model))):
        error = (case.run(each) - wanted).abs().max() / wanted.abs().max()
        assert error <= bound, f"off by {error:.1e}"
    assert not torch.equal(case.run(case.build()), wanted)


def exactly_what_is_said_is_trained(case: Case) -> None:
    """Names by hand: what `train` selects less what `freeze` does; pruned weights keep their zeros when stepped."""
    model = case.apply()
    wanted = hand.trained(case.program, case.build())
    found = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert {name for name in found if not name.endswith(hand.ADDED)} == wanted
    zeros = {name: tensor == 0 for name, tensor in surgery.parameters(model).items() if name in wanted}
    before = bits(model)
    stepper = torch.optim.AdamW(surgery.parameters(model).values(), lr=0.01)
    case_loss(model.train(), case).backward()
    stepper.step()
    pruned = any(isinstance(statement.operation, Prune) for statement in case.program.statements)
    for name, tensor in surgery.parameters(model).items():
        assert not torch.equal(tensor, before[name]), f"{name} does not move"
        if pruned and name in wanted and tensor.dim() > 1 and name.rpartition(".")[0] != "embed":
            assert (tensor[zeros[name]] == 0).all(), f"{name} has lost zeros"
    found = surgery.verify(model, example_inputs=(case.model.tokens,)).of("frame")
    assert found
    assert all(finding.status == "holds" for finding in found)


def optimizers_step_what_is_trained(case: Case) -> None:
    """Every optimizer moves what the program trains and nothing else; paged gives the bits of unpaged."""
    one, other = case.apply(), case.apply(_unpaged(case.program))
    before = bits(one)
    pushed: set[str] = set()
    for model in (one, other):
        optimizer = surgery.optimizer(model)
        for _ in range(2):
            case_loss(model, case).backward()
            pushed |= {name for name, tensor in surgery.parameters(model).items() if tensor.grad.abs().max() > 1e-6}
            optimizer.step()
            optimizer.zero_grad()
    assert same(bits(one), bits(other))
    moving = set(map(id, surgery.parameters(one).values()))  # tied ones under every name
    trained = {name for name, tensor in one.named_parameters(remove_duplicate=False) if id(tensor) in moving}
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(one).items() if name not in trained)
    still = {name for name in pushed if torch.equal(one.get_parameter(name), before[name])}
    assert pushed
    assert not still, f"{still} have gradients and do not move"


def _unpaged(program: Program) -> Program:
    plain = (
        replace(s, operation=replace(s.operation, paged=False)) if isinstance(s.operation, Optimize) else s
        for s in program.statements
    )
    return Program(tuple(plain), seed=program.seed)


def gradients_are_those_of_the_written_graph(case: Case) -> None:
    """What runs (fused, with gradients of its own) against the graph as methods wrote it, node by node."""
    model = case.apply().train()
    randomise(model)
    torch.manual_seed(0)
    before = bits(model)
    case_loss(model, case).backward()
    assert same(before, bits(model)), "a backward pass wrote to the model"
    found = {name: parameter.grad.clone() for name, parameter in surgery.parameters(model).items()}
    model.zero_grad()
    for _, module in rewritten(model):
        if module.facts is not None:
            module.forward = partial(torch.fx.Interpreter(module, graph=module.full).run)
    torch.manual_seed(0)
    case_loss(model, case).backward()
    wanted = {name: parameter.grad for name, parameter in surgery.parameters(model).items()}
    # What cancels in one gradient is rounded as the others are.
    largest = max((gradient.abs().max().item() for gradient in wanted.values()), default=0.0)
    for name, gradient in wanted.items():
        # A recurrent network that makes one position has read nothing before it.
        assert gradient.abs().max() > 0 or "weight_hh" in name, f"{name} gets no gradient"
        slack = 1e-5 if case.has(Quantize) else 1e-10  # `compute fp32` rounds on its way
        assert torch.allclose(found[name], gradient, rtol=0, atol=slack * largest), name


def case_loss(model: nn.Module, case: Case) -> Tensor:
    logits = model(case.model.tokens)
    return (logits * torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype)).square().mean()


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
    """Packed bytes and scales equal bitsandbytes' own for the same weights, pruned first where they are."""
    import bitsandbytes.functional as bnb

    quantize = next(s.operation for s in case.program.statements if isinstance(s.operation, Quantize))
    prunes = tuple(s for s in case.program.statements if isinstance(s.operation, Prune))
    base = case.apply(Program(prunes, seed=case.program.seed)) if prunes else case.build()
    model = case.apply()
    places = [path for path, module in rewritten(model) if module.facts is not None]
    assert places
    for path in places:
        weight = base.get_parameter(f"{path}.weight").detach()
        codes, state = bnb.quantize_4bit(
            (weight.float() if weight.dtype == torch.float64 else weight).contiguous(),
            blocksize=quantize.block,
            compress_statistics=quantize.double,
            quant_type=quantize.format,
        )
        module: Any = model.get_submodule(path)
        assert torch.equal(getattr(module, "weight_codes", module._parameters.get("weight")), codes), path
        assert torch.equal(module.weight_absmax, state.absmax), path
        wide = widened(codes, state)
        assert (wide[weight == 0] == 0).all(), "a zero is none after quantization"
        x = torch.randn(3, wide.shape[1], generator=zoo.seeded(0, path), dtype=torch.float64).to(weight.dtype)
        bias = module._parameters.get("bias")
        with surgery.disabled(model), torch.no_grad():
            found = module(x).double()
        wanted = nn.functional.linear(x.double(), wide.double(), None if bias is None else bias.double())
        narrow = torch.float32 if quantize.compute == "fp32" and weight.dtype == torch.float64 else weight.dtype
        assert (found - wanted).abs().max() <= merge_bound(narrow, 1, 1.0) * max(1.0, wanted.abs().max().item())


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


def nothing_else_moves(case: Case) -> None:
    """Unselected tensors keep their bits, base names stay, gradients reach what was declared and nothing else."""
    base = case.build()
    keys = list(base.state_dict())
    before = {name: tensor.clone() for name, tensor in base.named_parameters()}
    model = case.apply(model=base).train()
    declared = surgery.parameters(model)
    now = dict(model.named_parameters())
    assert [name for name in model.state_dict() if name in before] == [name for name in keys if name in before]
    touched: set[str] = set()
    for step in case.plan().steps:
        if isinstance(step.operation, Prune | Sparse | Quantize) or getattr(step.operation, "from_weight", False):
            for part in step.parts:
                name = f"{part.path}.weight"
                touched.add(name)
                if part.channels is not None and name in now and now[name].shape == before[name].shape:
                    rows = torch.ones(part.shape[0], dtype=torch.bool)
                    for start, stop in part.channels:
                        rows[start:stop] = False
                    changed = (now[name] != before[name]).any(dim=1)
                    if sum(part.path == p.path for s in case.plan().steps for p in s.parts) == 1:
                        assert not changed[rows].any(), f"rows of {name} that were not selected moved"
    for name, tensor in before.items():
        assert name in touched or torch.equal(now[name], tensor), f"{name} moved"
    assert {name for name, parameter in now.items() if parameter.requires_grad} == set(declared)
    randomise(model)
    case_loss(model, case).backward()
    for name, parameter in now.items():
        assert (parameter.grad is not None) == (name in declared), name


def ties_stay_ties(case: Case) -> None:
    model = case.apply()
    assert model.head.weight is model.embed.weight
    randomise(model)
    if " embed" not in str(case.program):
        assert surgery.merge(model).head.weight is model.embed.weight


def saved_is_loaded(case: Case) -> None:
    model = case.apply()
    randomise(model)
    with tempfile.TemporaryDirectory() as directory:
        surgery.save(model, Path(directory) / "out")
        loaded = surgery.load(Path(directory) / "out", model=case.model.build())
    assert same(bits(model), bits(loaded))
    assert surgery.parameters(model).keys() == surgery.parameters(loaded).keys()
    assert torch.equal(case.run(model), case.run(loaded))
    with surgery.disabled(model), surgery.disabled(loaded):
        assert torch.equal(case.run(model), case.run(loaded))


def verify_is_green_and_leaves_no_trace(case: Case) -> None:
    model = case.apply()
    randomise(model)
    model.train()
    model.layers[0].eval()
    before, modes = bits(model), [module.training for module in model.modules()]
    where = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    report = surgery.verify(model, example_inputs=(case.model.tokens,))
    assert report, str(report)
    assert not report.warnings, str(report)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(before, bits(model))
    assert where == {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert modes == [module.training for module in model.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())
    json.dumps(report.to_json(), allow_nan=False)


def graphs_are_clean(case: Case) -> None:
    """Lint holds, new nodes say which statement they come from, and the model agrees with its own export."""
    model = case.apply()
    randomise(model)
    statements = {str(statement) for statement in case.program.statements}
    found: set[str] = set()
    for path, module in rewritten(model):
        module.graph.lint()
        module.full.lint()
        for node in module.full.nodes:
            names = [name for name in module.added if node.op == "get_attr" and node.target == name]
            assert not names or node.meta.get("statement") in statements, f"{path}: {node} says nothing"
        found |= {node.meta["statement"] for node in module.full.nodes if "statement" in node.meta}
    attached = {str(s) for s in case.program.statements if s.operation.phase == "attach"}
    assert attached <= found <= statements
    exported = torch.export.export(model.eval(), (case.model.tokens,), strict=False).module()
    wanted = case.run(model)
    eps = max(case.model.eps, torch.finfo(torch.float32).eps if case.has(Quantize) else 0.0)
    assert (exported(case.model.tokens) - wanted).abs().max() <= 64 * eps * wanted.abs().max()


def causal_and_independent(case: Case) -> None:
    """Later tokens change no earlier logits, and rows of a batch do not see one another."""
    model = case.apply()
    randomise(model)
    wanted = case.run(model)
    tokens = case.model.tokens.clone()
    tokens[:, -1] = (tokens[:, -1] - 3 + 1) % (case.model.shape.vocabulary - 3) + 3
    # `compute fp32` rounds as float32 does, and differently for another number of rows.
    slack = (1e-5 if case.has(Quantize) else 1e-9) * wanted.abs().max()
    assert (case.run(model, tokens) - wanted)[:, :-1].abs().max() <= slack
    assert (case.run(model, tokens) - wanted)[:, -1].abs().max() > slack
    assert (case.run(model, case.model.tokens[:1]) - wanted[:1]).abs().max() <= slack


def soft_equals_hard(case: Case) -> None:
    """A prefix that starts from a text is that text in front: same logits, positions and mask included."""
    words = torch.tensor([7, 3, 11])
    text = " ".join(f"w{int(word)}" for word in words)
    prefix = Prefix(init=Variant("text", text))
    model = case.apply(Program((Statement(prefix, Role("layers")),)))
    prompted = torch.cat((words.expand(2, -1), case.model.tokens), dim=1)
    wanted = case.run(case.build(), prompted)[:, len(words) :]
    error = ((case.run(model) - wanted).abs().max() / wanted.abs().max()).item()
    assert error <= 1e-10, f"off by {error:.1e}"
    plain = case.run(case.build())
    assert (plain - wanted).abs().max() > 1e-3 * wanted.abs().max(), "the text has no effect"


def texts_are_read_first(case: Case) -> None:
    """An instruction, kept or not, and a prompt that starts from a text are that text in front; both are one text."""
    first, second = "w7 w3 w11", "w2 w9"
    instruct = Instruct(text=first)
    ways: list[tuple[str, tuple[Operation, ...]]] = [
        (first, (instruct,)),
        (first, (replace(instruct, cached=True),)),
        (first, (Prompt(init=Variant("text", first)),)),
        (f"{second} {first}", (instruct, Prompt(init=Variant("text", second)))),
    ]
    for text, operations in ways:
        words = torch.tensor([int(word[1:]) for word in text.split()])
        model = case.apply(Program(tuple(Statement(each, Role("layers")) for each in operations)))
        prompted = torch.cat((words.expand(2, -1), case.model.tokens), dim=1)
        wanted = case.run(case.build(), prompted)[:, len(words) :]
        error = ((case.run(model) - wanted).abs().max() / wanted.abs().max()).item()
        assert error <= 1e-10, f"{operations} off by {error:.1e}"


def made_prompts_mean_their_formula(case: Case) -> None:
    """P-tuning is the prompt that torch's own layers make of its tensors; a merge keeps just that, to the bit."""
    for via in (Variant("mlp", 5), Variant("lstm", 3)):
        made = case.apply(Program((Statement(Ptuning(version="v1", positions=4, via=via), Role("layers")),)))
        randomise(made)
        held = {path.rpartition("ptuning_")[2]: tensor for path, tensor in surgery.parameters(made).items()}
        plain = case.apply(Program((Statement(Prompt(positions=4), Role("layers")),)))
        with torch.no_grad():
            (prompt,) = surgery.parameters(plain).values()
            prompt.copy_(hand.made_prompt(held))
        wanted, got = case.run(plain), case.run(made)
        assert (got - wanted).abs().max() <= 1e-10 * wanted.abs().max()
        surgery.merge(made)
        assert torch.equal(case.run(made), got)
        assert len(surgery.parameters(made)) == 1


def starts_are_nearer_the_weight(case: Case) -> None:
    """Codes and an adapter that starts from the weight lose less of it than codes alone."""
    (quantize,) = (each for each in case.program.statements if isinstance(each.operation, Quantize))
    base, coded = dict(case.build().named_parameters()), case.apply(Program((quantize,)))
    alone = dict(surgery.merge(coded).named_parameters())
    plan = case.plan()
    merged = dict(surgery.merge(case.apply()).named_parameters())
    for part in (part for step in plan.steps if isinstance(step.operation, Lora) for part in step.parts):
        name = f"{part.path}.weight"
        rows = torch.cat([torch.arange(*run) for run in part.channels or ((0, part.shape[0]),)])
        lost, found = ((each[name] - base[name])[rows].norm() for each in (alone, merged))
        assert found < lost, f"{found:.3e} of {name} is lost, and {lost:.3e} without an adapter"


def budgets_are_kept_and_used(case: Case) -> None:
    """No more than the share, by count; one more for every matrix would be too much. Or even rank 1 is, and says so."""
    (statement,) = case.program.statements
    budget: Any = statement.operation
    total = sum(parameter.numel() for parameter in case.build().parameters())
    shapes = {}
    for spot in hand.spots(statement.selector, case.model.shape):
        path, rows, _ = hand.place(spot, case.model.shape)
        weight: Any = case.build().get_submodule(path).weight[rows]
        shapes[spot] = tuple(weight.shape)

    def spent(rank: int) -> float:
        count = sum(min(rank, *shape) * sum(shape) for shape in shapes.values())
        return count / (total + count)

    if spent(1) > budget.budget:
        with pytest.raises(surgery.SurgeryError, match="S118"):
            case.plan()
        return
    model = case.apply()
    tensors = surgery.parameters(model)
    trained = sum(tensor.numel() for tensor in tensors.values())
    assert trained / (total + trained) <= budget.budget
    equal = min(tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name)
    most = max(tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name)
    assert spent(most + 1) > budget.budget or most == max(min(shape) for shape in shapes.values())
    assert most - equal <= 1 or equal == min(min(shape) for shape in shapes.values())


def copies_are_independent(case: Case) -> None:
    model = case.apply()
    randomise(model)
    wanted = case.run(model)
    copied = copy.deepcopy(model)
    assert torch.equal(case.run(copied), wanted)
    randomise(copied, seed=1)
    assert not torch.equal(case.run(copied), wanted)
    assert torch.equal(case.run(model), wanted)


def programs_compose(case: Case) -> None:
    """Cut in two anywhere, one after the other, saved between or not: as one, or refused and nothing changed."""
    wanted = case.apply()
    statements, seed = case.program.statements, case.program.seed
    for cut in range(1, len(statements)):
        first, second = (Program(part, seed=seed) for part in (statements[:cut], statements[cut:]))
        if all(each.operation.phase == "schedule" or each.operation.freezes for each in first.statements):
            continue  # has nothing to do on its own
        model = case.apply(first)
        with tempfile.TemporaryDirectory() as directory:
            surgery.save(model, Path(directory) / "out")
            loaded = surgery.load(Path(directory) / "out", model=case.build())
        before, logits = bits(model), case.run(model)
        if _comes_too_late(case, second, model):
            assert same(bits(model), before)
            assert torch.equal(case.run(model), logits)
            continue
        for again in (case.apply(second, model), case.apply(second, loaded)):
            assert same(bits(again), bits(wanted))
            assert torch.equal(case.run(again), case.run(wanted))
            with surgery.disabled(again), surgery.disabled(wanted):
                assert torch.equal(case.run(again), case.run(wanted))
        trained = case.apply(first)
        values = {name: tensor.clone() for name, tensor in randomise(trained).items()}
        if not _comes_too_late(case, second, trained):
            case.apply(second, trained)
            now = dict(trained.named_parameters())
            assert all(torch.equal(now[name], value) for name, value in values.items()), "trained values are lost"


def _comes_too_late(case: Case, program: Program, model: nn.Module) -> bool:
    try:
        case.plan(program, model)
    except surgery.SurgeryError as error:
        refusal = error
    else:
        return False
    assert {each.code for each in refusal.diagnostics} == {"S106"}, refusal
    with pytest.raises(surgery.SurgeryError):
        case.apply(program, model)
    return True


# Where they are tried


@st.composite
def cases(
    draw: st.DrawFn,
    programs: Callable[[Model], st.SearchStrategy[Program]],
    dtypes: tuple[str, ...] = ("float64",),
    **fixed: Any,
) -> Case:
    model = draw(strategies.models(dtypes, **fixed))
    return Case(model, draw(programs(model)))


def _one(operation: st.SearchStrategy[Any]) -> Callable[[Model], st.SearchStrategy[Program]]:
    def programs(model: Model) -> st.SearchStrategy[Program]:
        statement = strategies.statements(model, operation)
        return st.builds(lambda made, seed: Program((made,), seed=seed), statement, st.integers(0, 9))

    return programs


def _plain_loras(model: Model) -> st.SearchStrategy[Program]:
    """Adapters only, without pissa, which changes the base."""
    return strategies.programs(model, exact=True).map(
        lambda p: Program(tuple(s for s in p.statements if isinstance(s.operation, Lora)), seed=p.seed)
    )


def _masked(*operations: Callable[[], st.SearchStrategy[Any]]) -> Callable[[Model], st.SearchStrategy[Program]]:
    def programs(model: Model) -> st.SearchStrategy[Program]:
        statement = strategies.masked(model, st.one_of([operation() for operation in operations]))
        return st.builds(lambda made, seed: Program((made,), seed=seed), statement, st.integers(0, 9))

    return programs


def _quantized(model: Model) -> st.SearchStrategy[Program]:
    statement = st.builds(Statement, strategies.quantizes(), st.just(Role("base")))
    pruned = strategies.statements(model, strategies.prunes(ratios=False))
    return st.builds(lambda q, p: Program((q, *p)), statement, st.just(()) | pruned.map(lambda each: (each,)))


def _any(model: Model) -> st.SearchStrategy[Program]:
    return strategies.programs(model)


def _from_weights(model: Model) -> st.SearchStrategy[Program]:
    """4-bit weights, and an adapter that starts from some of them."""
    starts: st.SearchStrategy[Any] = st.sampled_from(["pissa", Variant("loftq", 1), Variant("loftq", 3)])
    adapters = st.builds(Lora, rank=st.integers(1, 3), alpha=strategies.numbers(), init=starts)
    quantize = st.builds(Statement, strategies.quantizes(), st.just(Role("base")))
    return st.builds(lambda q, a: Program((q, a)), quantize, strategies.statements(model, adapters))


def _budgets(model: Model) -> st.SearchStrategy[Program]:
    budgets = st.builds(Lora, budget=st.sampled_from([0.03, 0.1, 0.25, 0.6, 0.9]))
    return st.builds(lambda made: Program((made,)), strategies.statements(model, budgets))


def _kept(model: Model) -> st.SearchStrategy[Program]:
    """Without pissa and loftq, whose base is what their start leaves over."""
    return _any(model).filter(lambda p: not any(getattr(s.operation, "from_weight", False) for s in p.statements))


def _exact(model: Model) -> st.SearchStrategy[Program]:
    return strategies.programs(model, exact=True)


def _merging(model: Model) -> st.SearchStrategy[Program]:
    return strategies.programs(model, merging=True)


def _narrow(model: Model) -> st.SearchStrategy[Program]:
    return st.builds(
        lambda made, seed: Program(tuple(made), seed=seed), strategies.bottlenecks(model), st.integers(0, 9)
    )


def _rescaled(model: Model) -> st.SearchStrategy[Program]:
    """IA3, or biases added to what has none, or both."""
    factors = strategies.statements(model, st.just(Ia3()))
    biases = st.just(Statement(Train(add=True), Role("bias")))
    chosen = st.one_of(st.tuples(factors), st.tuples(biases), st.tuples(factors, biases))
    return st.builds(Program, chosen, seed=st.integers(0, 9))


@st.composite
def _trained(draw: st.DrawFn, model: Model) -> Program:
    """What of the base is trained, perhaps pruned, beside an adapter."""
    made = draw(strategies.trainings(model))
    if draw(st.booleans()):
        made.append(draw(strategies.statements(model, strategies.loras(exact=True))))
    if draw(st.booleans()):
        made.append(draw(strategies.statements(model, strategies.prunes(ratios=False))))
    return Program(tuple(draw(st.permutations(made))), seed=draw(st.integers(0, 9)))


@st.composite
def _optimized(draw: st.DrawFn, model: Model) -> Program:
    made = [Statement(draw(strategies.optimizes()), Union(())), *draw(strategies.trainings(model))]
    return Program(tuple(draw(st.permutations(made))))


def _text(model: Model) -> st.SearchStrategy[Program]:
    return st.just(Program((Statement(Prefix(positions=3), Role("layers")),)))


_FLOATS = ("float64", "float32", "bfloat16")
_ANY = cases(_any)

LAWS: tuple[Law, ...] = (
    Law("prints and parses", "what is printed is read back", prints_and_parses, _ANY, 0),
    Law("comments stay", "formatting keeps every comment and is idempotent", comments_stay, _ANY, 0),
    Law(
        "errors point", "a misspelt word is reported where it stands", errors_point_at_the_place, cases(_plain_loras), 0
    ),
    Law("defaults", "a short statement means what the papers do", defaults_are_the_papers, _ANY, 0),
    Law(
        "conflicts",
        "statements that cannot commute are refused, both named",
        conflicts_are_refused,
        cases(_plain_loras),
    ),
    Law("plans reproduce", "same plan every time and in every order", plans_are_reproducible, _ANY),
    Law("plans count", "the plan names what changes, and only that", plans_count_what_changes, _ANY),
    Law("order", "permuted statements give the same bits", order_means_nothing, cases(_any, _FLOATS), 2),
    Law("seeds", "every tensor draws numbers of its own", seeds_tell_tensors_apart, cases(_plain_loras)),
    Law("identity", "what is attached changes no bit at the start", identity_at_the_start, cases(_exact, _FLOATS), 2),
    Law("off", "switched off, the base comes back to the bit", off_means_off, cases(_kept, _FLOATS), 2),
    Law("formula", "adapters compute W x + s B A x", adapters_mean_their_formula, cases(_plain_loras)),
    Law("bottlenecks", "adapters on edges are what they say", bottlenecks_mean_their_formula, cases(_narrow)),
    Law("merge", "merged equals unmerged within the bound", merging_changes_nothing, cases(_merging, _FLOATS), 2),
    Law("merged weights", "a merge gives W + s B A", merged_weights_mean_their_formula, cases(_plain_loras)),
    Law(
        "gradients",
        "the graph that runs has the written graph's gradients",
        gradients_are_those_of_the_written_graph,
        _ANY,
        2,
    ),
    Law(
        "zeros",
        "exactly as many zeros as asked, the right ones",
        zeros_are_as_many_as_asked,
        cases(_one(strategies.prunes())),
    ),
    Law(
        "monotone",
        "pruning more keeps the zeros, pruning twice is once",
        more_pruning_keeps_the_zeros,
        cases(_one(strategies.prunes(ratios=False))),
        2,
    ),
    Law(
        "sparse training",
        "swaps, cuts and steps are those of the papers, to the bit",
        dynamic.trained_as_in_the_papers,
        cases(_masked(strategies.sparses, strategies.gradual), ("float64", "float32")),
        3,
    ),
    Law(
        "resumed",
        "a schedule that is interrupted goes on with the same bits",
        dynamic.interrupted_training_goes_on,
        cases(_masked(lambda: strategies.sparses(("set", "rigl")), strategies.gradual), _FLOATS),
        3,
    ),
    Law(
        "tickets",
        "lottery tickets are those of the paper",
        dynamic.tickets_as_in_the_paper,
        cases(_masked(strategies.lotteries)),
        3,
    ),
    Law("codes", "4-bit bytes are bitsandbytes' own, zeros stay", codes_are_bitsandbytes, cases(_quantized, _FLOATS)),
    Law("frame", "nothing else moves or is trained", nothing_else_moves, cases(_any, _FLOATS), 2),
    Law("ties", "tied weights stay one tensor", ties_stay_ties, cases(_merging, tied=True)),
    Law("round trip", "saved is loaded", saved_is_loaded, cases(_any, _FLOATS), 2),
    Law(
        "verify",
        "verification is green and leaves no trace",
        verify_is_green_and_leaves_no_trace,
        cases(_any, _FLOATS),
        3,
    ),
    Law("graphs", "lint clean, nodes say whose they are, exports agree", graphs_are_clean, cases(_any), 3),
    Law("causal", "no token sees a later one or another row", causal_and_independent, cases(_any), 2),
    Law(
        "texts",
        "instructions and prompts from a text are that text",
        texts_are_read_first,
        cases(_text, positions="rotary") | cases(_text, positions="learned"),
        2,
    ),
    Law(
        "made prompts", "networks make the prompts they should, and fold", made_prompts_mean_their_formula, cases(_text)
    ),
    Law(
        "soft equals hard",
        "a prefix from a text is that text",
        soft_equals_hard,
        cases(_text, positions="rotary") | cases(_text, positions="learned"),
    ),
    Law("factors", "ia3 and added biases are what they say", factors_mean_their_formula, cases(_rescaled), 2),
    Law("trained", "exactly what is said is trained", exactly_what_is_said_is_trained, cases(_trained), 2),
    Law(
        "optimizer",
        "steps what is trained, the same bits paged",
        optimizers_step_what_is_trained,
        cases(_optimized, ("float64", "float32")),
        2,
    ),
    Law(
        "starts near",
        "codes with an adapter from the weight lose less than codes alone",
        starts_are_nearer_the_weight,
        cases(_from_weights),
        2,
    ),
    Law("budgets", "ranks cost what a budget allows, and no less", budgets_are_kept_and_used, cases(_budgets)),
    Law("again", "a second program is as if both had been one", programs_compose, cases(_any, _FLOATS), 3),
    Law(
        "layers",
        "layers are those asked for, silent ones change nothing",
        reshaping.layers_are_those_asked_for,
        cases(reshaping.depths),
    ),
    Law(
        "experts",
        "mixtures are their formula, and unchanged at first",
        reshaping.mixtures_mean_their_formula,
        cases(reshaping.upcyclings),
    ),
    Law(
        "required",
        "a result is handed over where it is as required, by an independent count",
        requiring.handed_over_where_it_is_so,
        cases(requiring.requirements, ("float64", "float32")),
        3,
    ),
    Law("copies", "a deep copy is equal and independent", copies_are_independent, _ANY, 2),
)

BY_NAME: dict[str, Law] = {law.name: law for law in LAWS}


def sites(model: nn.Module) -> list[Rewritten]:
    return [module for _, module in rewritten(model)]
