"""A transformed model as a program of torch's own operators, which runs where nothing but torch is installed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from surgery.anatomy.inputs import example
from surgery.anatomy.trace import quiet
from surgery.checkpoint.interchange.pt2_codes import plain_operators
from surgery.checkpoint.save import copy_tokenizer
from surgery.checkpoint.staging import staged
from surgery.compiler.record import record_of
from surgery.compiler.switch import refuse_routed
from surgery.errors import CheckpointError

FILE = "model.pt2"
TORCH = ("aten", "prim", "prims", "higher_order")


def export(
    model: nn.Module,
    path: Path,
    *,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    source: Path | None = None,
    force: bool = False,
) -> None:
    """Write model.pt2, for `torch.export.load(path).module()`, in evaluation mode; the model stays as it is.

    A transformers model takes input_ids and attention_mask (both (batch, length) of any batch and length; for two
    stacks decoder_input_ids as well), and gives a dictionary of tensors, as `logits`, without a cache. A plain module
    takes what its example has, of any size where its code does not say one. Adapters are on or off as they are now.
    Errors: S421 not transformed, S456 what torch.export cannot follow, S457 operators of other packages.
    """
    if record_of(model) is None:
        raise CheckpointError.of("S421", "this model was not transformed: export it with torch.export itself")
    refuse_routed(model)
    program = traced(model, example_inputs)
    with staged(path, force) as partial:
        torch.export.save(program, partial / FILE)
        if source is not None and hasattr(model, "config"):
            copy_tokenizer(source, partial)


def traced(model: nn.Module, example_inputs: tuple[Any, ...] | Mapping[str, Any] | None) -> ExportedProgram:
    """The program, of torch's operators alone. Errors: S456, S457."""
    args, keywords = _fed(model, example_inputs)
    strictly = example_inputs is None
    shapes = {name: _dynamic(value, strictly) for name, value in keywords.items()}
    try:
        with _evaluated(model), torch.no_grad(), quiet():
            program = torch.export.export(
                Answer(model, keywords) if keywords else model,
                args,
                keywords,
                dynamic_shapes=shapes or tuple(_dynamic(value, strictly) for value in args),
                strict=False,
            )
            codes = "bitsandbytes" in _packages(program)
            if codes or any(isinstance(node.target, torch._ops.HigherOrderOperator) for node in _calls(program)):
                # Also where there are regions, as without autocast, which torch.export.save does not take as they are.
                program = program.run_decompositions(dict(plain_operators()) if codes else {})
    except Exception as error:
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError.of(
            "S456",
            f"torch.export cannot follow {type(model).__name__} for inputs of any batch and length: {first[:300]}",
            help="`surgery export --to huggingface` writes what `from_pretrained` loads",
        ) from error
    foreign = sorted({str(node.target) for node in _calls(program) if _foreign(node.target)})
    if foreign:
        raise CheckpointError.of(
            "S457",
            f"{type(model).__name__} computes with {', '.join(foreign)}, which torch alone does not have",
            help='for experts: `model.set_experts_implementation("batched_mm")` first',
        )
    return program


class Answer(nn.Module):
    """A model that takes tensors by name and gives the tensors of its answer in a dictionary."""

    def __init__(self, model: nn.Module, fed: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        cached = "use_cache" in inspect.signature(model.forward).parameters
        more = {"use_cache": False} if cached else {}

        def forward(**given: Any) -> Any:
            answer = model(**given, **more)
            if not isinstance(answer, Mapping):
                return answer
            return {name: value for name, value in answer.items() if isinstance(value, Tensor)}

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in fed])  # type: ignore[attr-defined]
        self.forward = forward


def _fed(model: nn.Module, given: tuple[Any, ...] | Mapping[str, Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named inputs to follow the model with."""
    if isinstance(given, tuple):
        return given, {}
    if given is not None:
        return (), dict(given)
    fed = example(model)
    if "attention_mask" in inspect.signature(model.forward).parameters:
        fed["attention_mask"] = torch.ones_like(fed["input_ids"])
        fed["attention_mask"][0, :2] = 0
    return (), fed


def _dynamic(value: Any, strictly: bool) -> Any:
    """Batch and length of any size; of an example that was given, every size that the model's code leaves open."""
    if not isinstance(value, Tensor):
        return None
    return dict.fromkeys((0, 1), Dim.DYNAMIC) if strictly else dict.fromkeys(range(value.dim()), Dim.AUTO)


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


def _calls(program: ExportedProgram) -> Iterator[fx.Node]:
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            yield from (node for node in module.graph.nodes if node.op == "call_function")


def _packages(program: ExportedProgram) -> set[str]:
    """Whose operators a program calls."""
    return {str(getattr(node.target, "namespace", "")) for node in _calls(program)}


def _foreign(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target.namespace not in TORCH
