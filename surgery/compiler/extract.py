"""The low-rank adapter nearest to what became of a model: truncated singular value decompositions, place by place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from surgery.anatomy.parts import Part
from surgery.compiler.apply import apply
from surgery.compiler.plan import Plan, Step
from surgery.compiler.plan import plan as make_plan
from surgery.compiler.record import record_of
from surgery.errors import CheckpointError
from surgery.graph.site import tensor_name
from surgery.language import parse
from surgery.language.program import Program
from surgery.operations.lora import Lora
from surgery.operations.lora_nearest import left_over, nearest


@dataclass(frozen=True)
class Extracted:
    """What an adapter holds of the difference at one place.

    effect: |difference| / |weight| in Frobenius norms, of the place's rows; of a stack, of all its matrices.
    error: |difference - adapter| / |difference|; zero where there is none. rank: of the adapter.
    """

    path: str
    role: str
    size: tuple[int, int]
    rank: int
    effect: float
    error: float


@dataclass(frozen=True)
class Extraction:
    """places: what was extracted. others: names of tensors that differ as well, and are the base's in the result.

    model: the base under the adapter, where it is in memory.
    """

    places: tuple[Extracted, ...]
    others: tuple[str, ...]
    model: nn.Module | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        rows = [("place", "", "out x in", "rank", "effect", "error")]
        for one in self.places:
            size = f"{one.size[0]} x {one.size[1]}"
            error = f"{one.error:.2%}" if one.effect else "the same"
            rows.append((one.path, one.role, size, str(one.rank), f"{one.effect:.2%}", error))
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join((*lines, *self.warnings()))

    def warnings(self) -> Iterator[str]:
        """What differs and was not extracted, in words."""
        if self.others:
            some = ", ".join(self.others[:8]) + (f" and {len(self.others) - 8} more" if len(self.others) > 8 else "")
            yield f"Not extracted: the selector does not cover {len(self.others)} tensors that differ: {some}"
        if not any(one.effect for one in self.places):
            yield "Nothing was extracted: no matrix that the selector covers differs"


def statement(rank: int, on: str = "all linear") -> Program:
    """`lora rank RANK on SELECTOR`, with what may follow a selector, such as `as NAME`."""
    return parse(f"lora rank {rank} on {on}", name="<extract>")


def extract(
    tuned: nn.Module,
    model: nn.Module,
    *,
    rank: int,
    on: str = "all linear",
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
) -> Extraction:
    """Adapt a base in place, so that it is nearest to a model that was tuned from it: W + B A for W + difference.

    tuned: has the base's tensors by name and shape. rank: of every adapter. on: a selector. Differences are taken in
    float32 (float64 where one of the two is) and decomposed in float64, exactly, which is the nearest in norm (Eckart
    and Young 1936). The result says for each matrix what is lost, and what else differs: it is the base's own.
    Errors: S446 a base that was transformed, S454 models of two kinds, S455 a difference that is no number, and those
    of `parse` and `plan`. The model is as it was then.
    """
    if record_of(model) is not None:
        raise CheckpointError.of("S446", "the base is transformed already", help="extract from a plain model's base")
    plan = make_plan(statement(rank, on), model, example_inputs=example_inputs)
    after, before = tensors(tuned), tensors(model)
    check_alike(before, after)
    covered = parts_of(plan)
    others = tuple(
        name for name in before if differs([part for _, part in covered.get(name, ())], before[name], after[name])
    )
    made = [
        (part, *factors(step, part, before[name], after[name])) for name, here in covered.items() for step, part in here
    ]
    apply(plan, model)
    with torch.no_grad():
        for part, values, _ in made:
            for name, value in values.items():
                keep_started(parameter(model.get_submodule(part.path), name), value)
    return Extraction(tuple(found for _, _, found in made), others, model)


def weight_of(part: Part) -> str:
    """The full name of a part's tensor."""
    return f"{part.path}.{part.parameter}" if part.path else part.parameter


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by every name that they have."""
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}


def parts_of(plan: Plan) -> dict[str, list[tuple[Step, Part]]]:
    """By the full name of a tensor, the parts of it that statements act on."""
    found: dict[str, list[tuple[Step, Part]]] = {}
    for step in plan.steps:
        for part in step.parts:
            found.setdefault(weight_of(part), []).append((step, part))
    return found


def check_alike(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> None:
    """Errors: S454 where two models have other tensors or shapes."""
    for names, what in (
        (base.keys() - tuned.keys(), "lacks"),
        (tuned.keys() - base.keys(), "has, and the base lacks,"),
    ):
        if names:
            some = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise CheckpointError.of(
                "S454", f"the tuned model {what} {len(names)} tensors: {some}", help="both must be of one class"
            )
    for name, tensor in base.items():
        if tensor.shape != tuned[name].shape:
            sizes = " and ".join(" x ".join(map(str, each.shape)) for each in (tensor, tuned[name]))
            raise CheckpointError.of(
                "S454",
                f"{name} is {sizes} in the base and the tuned model: no adapter changes a shape",
                help="resize the base as the tuned model was, then extract",
            )


def differs(parts: Sequence[Part], before: Tensor, after: Tensor) -> bool:
    """Whether a tensor differs where none of these parts of it is."""
    if any(part.channels is None for part in parts):
        return False
    if parts:
        kept = torch.ones(_oriented(parts[0], before).shape[-2], dtype=torch.bool)
        for start, stop in (run for part in parts for run in part.channels or ()):
            kept[start:stop] = False
        before, after = (_oriented(parts[0], each)[..., kept, :] for each in (before, after))
    return not torch.equal(before, after) if before.dtype == after.dtype else bool((before != after).any())


def factors(step: Step, part: Part, before: Tensor, after: Tensor) -> tuple[dict[str, Tensor], Extracted]:
    """A and B in float64 by the names that the statement gives them, and what they hold. Errors: S455.

    Directions that the difference does not have are zero in B and no number in A: see `keep_started`.
    """
    lora = step.operation.at(part)
    assert isinstance(lora, Lora)
    wide = torch.float64 if torch.float64 in (before.dtype, after.dtype) else torch.float32
    delta = after.detach().to(wide) - before.detach()
    if not bool(delta.isfinite().all()):
        raise CheckpointError.of("S455", f"{weight_of(part)} of the tuned model or the base holds what is no number")
    weight = sum(_square(matrix) for matrix in _matrices(part, before.detach()))
    a, b, effect, error = [], [], 0.0, 0.0
    for matrix in _matrices(part, delta):
        one, other, real = nearest(matrix, lora.r, lora.factor)
        error += left_over(matrix, one, other, lora.factor) ** 2
        effect += _square(matrix)
        one[real:] = torch.nan
        a.append(one)
        b.append(other)
    suffix = f"_{part.parameter}" if part.kind == "experts" else ""
    values = {
        tensor_name(f"{name}{suffix}", part, step.statement.name): torch.stack(each) if suffix else each[0]
        for name, each in (("lora_A", a), ("lora_B", b))
    }
    found = Extracted(
        path=part.path if not suffix else weight_of(part),
        role=part.role,
        size=(b[0].shape[0], a[0].shape[1]),
        rank=lora.r,
        effect=(effect / weight) ** 0.5 if weight else float(effect > 0),
        error=(error / effect) ** 0.5 if effect else 0.0,
    )
    return values, found


def keep_started(held: Tensor, value: Tensor) -> None:
    """Give a tensor its values, where they are numbers: what says nothing yet stays as a new adapter has it."""
    held.copy_(torch.where(value.isnan(), held.to(value.dtype), value))


def parameter(module: nn.Module, name: str) -> nn.Parameter:
    """A tensor that a statement added at a module: in itself, or in the child that stands for what it computes."""
    (found,) = [held._parameters[name] for held in (module, *module.children()) if name in held._parameters]
    assert found is not None
    return found


def _oriented(part: Part, stored: Tensor) -> Tensor:
    """(..., out, in), as the place multiplies."""
    return stored.transpose(-1, -2) if part.transposed or part.kind == "lookup" else stored


def _matrices(part: Part, delta: Tensor) -> Sequence[Tensor]:
    """The part's rows of each matrix."""
    wide = _oriented(part, delta)
    if part.channels is not None:
        wide = torch.cat([wide[..., start:stop, :] for start, stop in part.channels], dim=-2)
    return list(wide) if part.kind == "experts" else [wide]


def _square(matrix: Tensor) -> float:
    """The square of the Frobenius norm."""
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
