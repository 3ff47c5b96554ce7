"""Which adapters of a model run and are trained: all, some by name, or none, to the bit of the base."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import nn

from surgery.errors import GraphError
from surgery.graph.module import Rewritten, added_parameters, rewritten, switched

RESTED = "_surgery_rested"
ROUTED = "_surgery_routed"


def names(model: nn.Module) -> set[str]:
    """Names of everything that can be switched off: `default` where a statement has no `as NAME`."""
    return {name for _, module in rewritten(model) for name in module.branches()}


def check_names(model: nn.Module, wanted: Collection[str]) -> None:
    """Errors: GraphError S310 for a name that the model does not have."""
    known = names(model)
    for name in wanted:
        if name not in known:
            raise GraphError.of(
                "S310", f"no adapter `{name}` in this model", help=f"it has: {', '.join(sorted(known)) or 'none'}"
            )


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Run the base, to the bit: pruned and quantized as the program says, without anything attached to it."""
    with switched(model, {None}):
        yield


def active(model: nn.Module) -> tuple[str, ...]:
    """Names of the adapters that run now, in alphabetical order; () of the base, or of a model without adapters."""
    on = {name for _, module in rewritten(model) for name in module.branches() - module.off}
    return tuple(sorted(on))


def activate(model: nn.Module, *wanted: str) -> None:
    """Keep only these adapters on, by their names; `default` is what has no `as NAME`. None given: all on.

    What is switched off rests: it does not run, and its tensors do not want gradients until it is on again. A tensor
    that you have frozen yourself (`requires_grad_(False)`) stays frozen.
    Errors: GraphError S310 for a name that the model does not have, S375 inside of `surgery.route`.
    """
    check_names(model, wanted)
    refuse_routed(model)
    set_off(model, names(model) - set(wanted) if wanted else frozenset())


def set_off(model: nn.Module, off: Collection[str]) -> None:
    """Switch these off and all others on, and let what is off rest."""
    for _, module in rewritten(model):
        module.switch(off)
    rest(model)


def rest(model: nn.Module) -> None:
    """Let the tensors of branches that are off want no gradients, and those that are on what they wanted before."""
    running = {id(tensor) for _, module in rewritten(model) for tensor in _running(module)}
    rested, now = resting(model), set()
    for name, parameter in added_parameters(model).items():
        if id(parameter) not in running:
            if parameter.requires_grad or name in rested:
                now.add(name)
            parameter.requires_grad_(False)
        elif name in rested:
            parameter.requires_grad_(True)
    if now:
        model.__dict__[RESTED] = frozenset(now)
    else:
        model.__dict__.pop(RESTED, None)


def resting(model: nn.Module) -> frozenset[str]:
    """Full names of tensors that are trained whenever their adapter is on, and it is off."""
    found: frozenset[str] = model.__dict__.get(RESTED, frozenset())
    return found


def refuse_routed(model: nn.Module) -> None:
    """Errors: GraphError S375 inside of `surgery.route`."""
    held = model.__dict__.get(ROUTED)
    if held is not None and held() is model:  # a copy that was made inside holds the reference too
        raise GraphError.of(
            "S375",
            "the rows of a batch choose their adapters now",
            help="leave the `with surgery.route(...)` block first",
        )


def _running(module: Rewritten) -> Iterator[nn.Parameter]:
    """The parameters that the code of a place reads, itself or in its children."""
    used = {str(node.target).partition(".")[0] for node in module.graph.nodes if node.op in ("get_attr", "call_module")}
    for name, parameter in module.named_parameters():
        if name.partition(".")[0] in used:
            yield parameter
