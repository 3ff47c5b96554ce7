"""Per-row choice: every row of a batch runs with its own adapters, or as the base, in one pass through the model."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from surgery.compiler.record import record_of
from surgery.compiler.switch import ROUTED, check_names, names, refuse_routed
from surgery.errors import GraphError
from surgery.graph.module import Rewritten, rewritten
from surgery.graph.routing import Rows

Choice = str | Sequence[str] | None
BATCHES = ("input_ids", "inputs_embeds", "input_values", "input_features", "pixel_values", "decoder_input_ids")
CHECKPOINT = "_gradient_checkpointing_func"


@contextmanager
def route(model: nn.Module, rows: Sequence[Choice]) -> Iterator[None]:
    """Inside, row i of every batch runs with the adapters that rows[i] names: one, several, or None for the base.

        with surgery.route(model, ["french", "german", None]):
            model.generate(**three_texts, num_beams=4)

    Rows of None have the base's bits, as under `disabled`; the others are what `activate` of their names would give.
    The batch is the first dimension of the model's inputs and as long as `rows`; `generate` may widen it (beams,
    several sequences for each text). Gradients flow to the adapters of the rows that used them; layers that
    transformers checkpoints are computed again as they were the first time, also after the block.
    Errors: GraphError S310 for an unknown name, S375 for a batch of another size, S376 where a place is not the rows'
    own, S377 for what a whole batch must share. Nothing of the model stays changed.
    """
    refuse_routed(model)
    chosen = _chosen(model, rows)
    everywhere = frozenset.intersection(*chosen)
    some = frozenset.union(*chosen) - everywhere
    _refuse_what_is_shared(model, some)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    wanted = {name: Rows.of([name in row for row in chosen], device) for name in sorted(some)}
    off = names(model) - everywhere - some
    places = _places(model, some)
    with ExitStack() as stack:
        stack.enter_context(_switched(places, off, wanted))
        model.__dict__[ROUTED] = weakref.ref(model)
        stack.callback(model.__dict__.pop, ROUTED)
        stack.enter_context(_sized(model, len(chosen)))
        stack.enter_context(_computed_again(model, places, off, wanted))
        yield


Places = tuple[tuple[str, Rewritten, bool], ...]


def _chosen(model: nn.Module, rows: Sequence[Choice]) -> list[frozenset[str]]:
    """The names of every row."""
    if isinstance(rows, str) or not rows or not all(row is None or isinstance(row, Sequence) for row in rows):
        raise GraphError.of(
            "S375", "a route gives a name, or None, for every row of the batch", help='`["french", "german", None]`'
        )
    chosen = [frozenset() if row is None else frozenset([row] if isinstance(row, str) else row) for row in rows]
    check_names(model, frozenset.union(*chosen))
    return chosen


def _refuse_what_is_shared(model: nn.Module, some: frozenset[str]) -> None:
    """Errors: GraphError S377 when a name that some rows take and others do not changes what the whole batch has."""
    record = record_of(model)
    for step in record.plan.steps if record is not None else ():
        if (step.statement.name or "default") in some and step.operation.shared_by_rows:
            raise GraphError.of(
                "S377",
                f"`{step.statement}` cannot be chosen by row: {step.operation.shared_by_rows}",
                step.statement.span,
                help="name it in every row or in none, or run the rows that use it as a batch of their own",
            )
    for path, module in rewritten(model):
        for node in module.full.nodes:
            if node.meta.get("joint") in some and {"positions", "front"} & node.meta.keys():
                raise GraphError.of(
                    "S377",
                    f"`{node.meta['joint']}` puts positions in front at {path}, which all rows of a batch share",
                    help="name it in every row or in none, or run the rows that use it as a batch of their own",
                )


def _places(model: nn.Module, some: frozenset[str]) -> Places:
    """Every rewritten place with its path, and whether all rows may share what it computes: positions."""
    record = record_of(model)
    steps = record.plan.steps if record is not None else ()
    attention = [part.path for part in record.plan.anatomy.parts if part.kind == "attention"] if record else []
    positions = set()
    for step in steps:
        for part in step.parts:
            within = any(part.path.startswith(f"{path}.") for path in attention)
            if part.role == "position":
                positions.add(part.path)
            if (step.statement.name or "default") not in some:
                continue
            if part.kind == "experts" or part.role.startswith("experts") or (part.kind == "lookup" and within):
                what = "distances between positions" if part.kind == "lookup" else "tokens as a router sends them"
                raise GraphError.of(
                    "S376",
                    f"`{step.statement}` cannot be chosen by row at {part.path}, which reads {what}",
                    step.statement.span,
                    help="leave the place out of the adapter with `except`",
                )
    return tuple((path, module, path in positions) for path, module in rewritten(model))


@contextmanager
def _switched(places: Places, off: set[str], rows: Mapping[str, Rows]) -> Iterator[None]:
    """Every place in this state, then as before."""
    before = [(module, module.state) for _, module, _ in places]
    try:
        for path, module, shared in places:
            module.switch(off)
            module.route(off, rows, shared, path)
        yield
    finally:
        for module, state in before:
            module.switch(state[0])
            module.route(*state)


@contextmanager
def _sized(model: nn.Module, count: int) -> Iterator[None]:
    """Refuse a batch of another size before anything is computed."""
    routed = weakref.ref(model)

    def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = count if torch.compiler.is_compiling() else _batch(args, kwargs)
        if found in (None, count) or module is not routed():  # a copy that was made inside is not routed
            return
        if found % count == 0 and _generating():
            return
        raise GraphError.of(
            "S375",
            f"the route is for {count} row{'s' * (count != 1)}, and the batch has {found}",
            help="give a name or None for every row",
        )

    handle = model.register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _generating() -> bool:
    """Whether transformers' `generate` is what calls the model: it widens the batch by itself."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "generate" and frame.f_globals.get("__name__", "").startswith("transformers."):
            return True
        frame = frame.f_back
    return False


def _batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Length of the first dimension of what the model is called with."""
    named = [kwargs.get(name) for name in BATCHES]
    for value in (*named, *args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.shape[0]
    return None


@contextmanager
def _computed_again(model: nn.Module, places: Places, off: set[str], rows: Mapping[str, Rows]) -> Iterator[None]:
    """Layers that transformers checkpoints run as they do now whenever their backward pass comes."""
    kept = [(module, module.__dict__[CHECKPOINT]) for module in model.modules() if CHECKPOINT in module.__dict__]
    left: list[bool] = []

    def around(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def checkpointed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if left:  # a copy that was made inside
                return checkpoint(function, *args, **kwargs)

            def again(*inner: Any, **more: Any) -> Any:
                if all(dict(module.routes) == _own(module, off, rows) for _, module, _ in places):
                    return function(*inner, **more)
                with _switched(places, off, rows):
                    return function(*inner, **more)

            return checkpoint(again, *args, **kwargs)

        return checkpointed

    for module, checkpoint in kept:
        module.__dict__[CHECKPOINT] = around(checkpoint)
    try:
        yield
    finally:
        left.append(True)
        for module, checkpoint in kept:
            module.__dict__[CHECKPOINT] = checkpoint


def _own(module: Rewritten, off: set[str], rows: Mapping[str, Rows]) -> dict[str, Rows]:
    return {name: chosen for name, chosen in rows.items() if name in module.branches() - off}
