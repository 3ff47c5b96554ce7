"""Which weights matter, by what a model does with a calibration set: sensitivity, Wanda, and SparseGPT."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from surgery.errors import GraphError
from surgery.lazy import lazy, torch

if TYPE_CHECKING:
    from torch import Tensor

    from surgery.anatomy.parts import Anatomy
    from surgery.graph import calibration
    from surgery.graph.site import Site
else:
    calibration = lazy("surgery.graph.calibration")

# Rows (out, in) of a weight, and what is known of its inputs, to the mask of what stays and the rows as they go on.
Treat = Callable[["Tensor", "Tensor"], "tuple[Tensor, Tensor]"]
COLUMNS = 128  # that SparseGPT treats before it hands their error on
DAMP = 0.01  # share of the mean diagonal that is added to it


def sensitivity(sites: Sequence[Site], model: Any, sequences: Sequence[Tensor]) -> list[Tensor]:
    """Mean over the sequences of |dL/dw * w|, (out, in) of each site; L is the model's own loss on what it reads.

    Errors: GraphError S398 for a model that gives no loss, or one that is no number.
    """
    parameters = [model.get_submodule(site.path).get_parameter(site.part.parameter) for site in sites]
    found = taylor(parameters, model, sequences)
    return [total.t() if site.draft.facts.transposed else total for site, total in zip(sites, found, strict=True)]


def taylor(parameters: Sequence[Tensor], model: Any, sequences: Sequence[Tensor]) -> list[Tensor]:
    """Mean over the sequences of |dL/dw * w|, of the shape of each parameter. Errors as of `sensitivity`."""
    sums = [torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device) for parameter in parameters]
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        with calibration.quiet(model):
            for ids in sequences:
                with torch.enable_grad():
                    gradients = torch.autograd.grad(loss_of(model, ids), parameters)
                for total, gradient, parameter in zip(sums, gradients, parameters, strict=True):
                    total += (gradient * parameter.detach()).abs().float() / len(sequences)
    finally:
        for parameter, was in wanted.items():
            parameter.requires_grad_(was)
    return sums


def read_texts(operation: Any, anatomy: Anatomy, tokenizer: Any) -> list[Tensor]:
    """The sequences of a statement's `using`. Errors: PlanError S130."""
    vocabulary = max(part.shape[0] for part in anatomy.parts if part.role == "embed")
    return calibration.batches(operation.using, tokenizer, operation.samples, operation.length, vocabulary)


def loss_of(model: Any, ids: Tensor) -> Tensor:
    """The model's loss on a sequence: of each next token, or of the tokens themselves where it is no causal model."""
    ids = ids.to(next(model.parameters()).device)
    if hasattr(model, "config"):
        try:
            loss = getattr(model(input_ids=ids, labels=ids), "loss", None)
        except TypeError:
            loss = None
    else:
        logits = model(ids)
        fits = isinstance(logits, torch.Tensor) and logits.dim() == 3
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]) if fits else None
    if loss is None:
        raise GraphError.of(
            "S398", f"{type(model).__name__} gives no loss on text", help="`wanda` and `sparsegpt` need none"
        )
    if not torch.isfinite(loss):
        raise GraphError.of("S398", f"the loss on the calibration set is {loss.item()}")
    result: Tensor = loss
    return result


def by_layer(
    sites: Sequence[Site], context: Any, sequences: Sequence[Tensor], treat: Treat, square: bool
) -> Iterator[tuple[Site, Tensor, Tensor]]:
    """Every site, what stays of its rows, and their weight then, by what the pruned layers before make of the texts.

    square: treat is given x^T x / n, (in, in), over all n tokens; otherwise only its diagonal, (in,). Maps outside all
    layers read what the whole model was before. One layer's numbers are at hand at a time.
    """
    stacks = {stack.name: stack for stack in context.anatomy.stacks}
    groups: dict[str | None, dict[int, list[Site]]] = defaultdict(lambda: defaultdict(list))
    for site in sites:
        groups[site.part.stack][site.part.layer or 0].append(site)
    model = context.model
    with calibration.quiet(model):
        for name, layers in groups.items():
            if name is None:
                moments = Moments(square)
                with calibration.watched(model, [site.path for site in layers[0]], moments):
                    for ids in sequences:
                        calibration.read_ids(model, ids)
                for site in layers[0]:
                    with calibration.at_hand(model, site.path):
                        keep, rows = treat(site.rows_of(weight_of(site)), moments.of(site))
                    yield site, keep, rows
                continue
            walk = calibration.Walk(model, stacks[name].path, max(layers) + 1, sequences)
            for index in range(max(layers) + 1):
                here, moments = layers.get(index, []), Moments(square)
                treated = {}
                with calibration.at_hand(model, f"{stacks[name].path}.{index}"):
                    if here:
                        with calibration.watched(model, [site.path for site in here], moments):
                            walk.through(index)
                    for site in here:
                        treated[site] = treat(site.rows_of(weight_of(site)), moments.of(site))
                    if index < max(layers):
                        with standing_in(model, {site: rows for site, (_, rows) in treated.items()}):
                            walk.advance(index)
                for site, (keep, rows) in treated.items():
                    yield site, keep, rows


@contextmanager
def standing_in(model: Any, rows: Mapping[Site, Tensor]) -> Iterator[None]:
    """Inside, the model itself reads other rows of these sites' weights."""
    held = []
    try:
        for site, new in rows.items():
            parameter = model.get_submodule(site.path).get_parameter(site.part.parameter)
            held.append((parameter, parameter.data))
            changed = parameter.data.clone()
            site.set_rows(changed, new.to(changed.dtype))
            parameter.data = changed
        yield
    finally:
        for parameter, data in reversed(held):
            parameter.data = data


class Moments:
    """Means over tokens of x_i x_j, or of x_i^2, for what each of some maps reads; float32, or float64 of float64."""

    def __init__(self, square: bool) -> None:
        self.square = square
        self.sums: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = defaultdict(int)

    def __call__(self, path: str, x: Tensor) -> None:
        x = x if x.dtype == torch.float64 else x.float()
        found = x.t() @ x if self.square else x.square().sum(0)
        self.sums[path] = self.sums[path] + found if path in self.sums else found
        self.tokens[path] += len(x)

    def of(self, site: Site) -> Tensor:
        """Errors: GraphError S398 for a map that nothing reached, or that read what is no number."""
        if site.path not in self.sums:
            raise GraphError.of(
                "S398", f"{site.path} reads nothing of the calibration set", help="leave it out with `except`"
            )
        if not torch.isfinite(self.sums[site.path]).all():
            raise GraphError.of("S398", f"{site.path} reads what is no number on the calibration set")
        return self.sums[site.path] / self.tokens[site.path]


def weight_of(site: Site) -> Tensor:
    """(out, in) as the place reads it, in float32 at least."""
    weight = site.evaluate(site.weight)
    return weight.to(torch.float32) if weight.dtype.itemsize < 4 else weight


def reconstructed(
    weight: Tensor, hessian: Tensor, keep_in: Callable[[Tensor, int, int], Tensor], group: int = 0
) -> tuple[Tensor, Tensor]:
    """SparseGPT (Frantar and Alistarh 2023): the mask of what stays, and the weight with the others' error made up for.

    weight: (out, in). hessian: (in, in), x^T x. keep_in(scores, first, last): which of columns first..last stay, by
    w^2 / [H^-1]_jj^2. group: columns that are chosen together, of a pattern; otherwise all of a block of 128.
    Errors: GraphError S399 when the Hessian cannot be inverted.
    """
    w, h = weight.clone(), hessian.clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    w[:, dead] = 0
    h.diagonal().add_(DAMP * h.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(h)
    if failed:
        raise GraphError.of("S399", "the calibration set says too little of a map: its Hessian cannot be inverted")
    upper = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
    kept = torch.ones_like(w, dtype=torch.bool)
    columns = w.shape[1]
    width = COLUMNS - COLUMNS % group if group else COLUMNS
    for first in range(0, columns, width):
        last = min(first + width, columns)
        errors = torch.zeros(len(w), last - first, dtype=w.dtype, device=w.device)
        diagonal = upper.diagonal()
        for j in range(first, last):
            if j == first or (group and (j - first) % group == 0):
                until = min(j + group, last) if group else last
                kept[:, j:until] = keep_in(w[:, j:until].square() / diagonal[j:until].square(), j, until)
            error = w[:, j].masked_fill(kept[:, j], 0) / diagonal[j]
            w[:, j:last] -= error.unsqueeze(1) * upper[j, j:last]
            errors[:, j - first] = error
        w[:, last:] -= errors @ upper[first:last, last:]
    return kept, w.masked_fill(~kept, 0)
