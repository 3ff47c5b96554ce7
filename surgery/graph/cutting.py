"""Cutting units out of a model: tensors lose rows and columns, and what states a size is set to the new one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from surgery.anatomy.groups import Axis, Group
from surgery.anatomy.inputs import example
from surgery.anatomy.norms import rescaled
from surgery.errors import GraphError, ModelError
from surgery.graph import partial
from surgery.graph.calibration import quiet

STATED = {
    nn.Linear: ("out_features", "in_features"),
    nn.Embedding: ("num_embeddings", "embedding_dim"),
    nn.Conv1d: ("out_channels", "in_channels"),
}
"""Attributes of torch's own modules that state the axes of their weight."""
CONFIG = "config."
Staying = dict[str, dict[int, tuple[Axis, list[int]]]]  # of a tensor and an axis, the indices that stay


@dataclass(frozen=True)
class Size:
    """A number that a module states: its attribute `name`, or `config.NAME` of the configuration that it holds."""

    path: str
    name: str
    was: int
    now: int


@dataclass(frozen=True)
class Cut:
    """Units of a group that stay, in order, and the sizes that change with it."""

    group: Group
    kept: tuple[int, ...]
    sizes: tuple[Size, ...] = ()

    @cached_property
    def shared(self) -> tuple[int, ...]:
        """Key-value groups that stay: those of which a head does."""
        return tuple(dict.fromkeys(self.group.of[unit] for unit in self.kept)) if self.group.of else ()

    def staying(self) -> Iterator[tuple[Axis, list[int]]]:
        """Every axis with the indices of it that stay."""
        for axis in self.group.axes:
            yield axis, axis.staying(self.kept)
        for axis in self.group.shared:
            yield axis, axis.staying(self.shared)

    def leftmost(self) -> Cut:
        """A cut of the same shape, whatever weights there are."""
        of = self.group.of
        if not of:
            return replace(self, kept=tuple(range(len(self.kept))))
        each = len(self.kept) // len(self.shared)
        first = [[unit for unit, group in enumerate(of) if group == index][:each] for index in range(len(self.shared))]
        return replace(self, kept=tuple(sorted(unit for units in first for unit in units)))

    def to_json(self) -> dict[str, Any]:
        sizes = [[size.path, size.name, size.was, size.now] for size in self.sizes]
        return {"group": self.group.to_json(), "kept": len(self.kept), "groups": len(self.shared), "sizes": sizes}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Cut:
        """A cut of the same shape: which units went is known by the weights alone."""
        group = Group.from_json(data["group"])
        kept, groups = data["kept"], data["groups"]
        each = kept // groups if groups else 0
        units = [[unit for unit, of in enumerate(group.of) if of == index][:each] for index in range(groups)]
        chosen = sorted(unit for some in units for unit in some) if groups else range(kept)
        return cls(group, tuple(chosen), tuple(Size(*size) for size in data["sizes"]))


def cut(model: nn.Module, cuts: Sequence[Cut], inputs: Any = None, *, check: bool = True) -> None:
    """Take the units out, and see that what is left computes what the whole does with those units at zero.

    inputs: of a plain torch module; without them only transformers models are checked.
    Errors: GraphError S332 where it computes something else, and those of `narrow`.
    """
    given = _inputs(model, inputs) if check and cuts else None
    if given is None:
        narrow(model, cuts)
        return
    by_norms, noise = any(cut.group.norms for cut in cuts), 0.0
    if by_norms:  # what they compute of all channels cannot be masked from outside
        whole = copy.deepcopy(model)
        _change(whole, staying(cuts), _zeroed)
    else:
        with masked(model, cuts):
            wanted = _output(model, given)
            if wanted.dtype.itemsize < 4:
                with nudged(model, cuts):
                    noise = _size(_output(model, given) - wanted)
    narrow(model, cuts)
    try:
        found = _output(model, given)
    except Exception as error:
        raise _unequal(cuts, f"it cannot run ({error})") from error
    if by_norms:
        with partial.looking_at(whole, partial.narrow_norms(model, cuts)):
            wanted = _output(whole, given)
    # Rounding is some eps of the whole; a wrong row is of its size. In 16 bits many layers make more of it, though less
    # than of one unit in the last place of every output that is summed anew: how much depends on the processor.
    bound = max(_size(wanted) * _eps(wanted) ** 0.5, noise)
    if found.shape != wanted.shape or _size(found - wanted) > bound:
        raise _unequal(cuts, f"it gives other numbers than the whole with those {cuts[0].group.kind} at zero")


def _zeroed(tensor: Tensor, axis: int, index: Tensor, full: int) -> Tensor:
    return torch.zeros_like(tensor).index_copy(axis, index, tensor.index_select(axis, index))


def _unequal(cuts: Sequence[Cut], what: str) -> GraphError:
    return GraphError.of(
        "S332",
        f"{cuts[0].group.places[0]} cannot be cut: {what}",
        help="its forward goes by something else that depends on their number",
    )


def _size(value: Tensor) -> float:
    return float(torch.linalg.vector_norm(value, dtype=torch.float64))


def _eps(value: Tensor) -> float:
    return torch.finfo(value.dtype).eps


def _inputs(model: nn.Module, inputs: Any) -> Any:
    try:
        return example(model) if inputs is None else inputs
    except ModelError:
        return None


def _output(model: nn.Module, inputs: Any) -> Tensor:
    """The first floating tensor that a model gives, in eval mode."""
    with quiet(model):
        given = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    found: Tensor = next(x for x in tree_leaves(given) if isinstance(x, Tensor) and x.is_floating_point())
    return found


def narrow(model: nn.Module, cuts: Sequence[Cut]) -> None:
    """Take the units out of the model's tensors, live or on the meta device; ties, dtypes and gradients' flags stay.

    Every tensor that changes is a new one. Errors: GraphError S332 where a tensor is also used elsewhere.
    """
    _change(model, staying(cuts), lambda tensor, axis, index, full: tensor.index_select(axis, index))
    _rescale(model, cuts)
    _state(model, [size for cut in cuts for size in cut.sizes])


def widen(model: nn.Module, cuts: Sequence[Cut]) -> None:
    """The inverse: put zeros where units were taken out."""

    def padded(tensor: Tensor, axis: int, index: Tensor, full: int) -> Tensor:
        shape = [*tensor.shape]
        shape[axis] = full
        return tensor.new_zeros(shape).index_copy(axis, index, tensor)

    _rescale(model, cuts, back=True)
    _change(model, staying(cuts), padded)
    _state(model, [replace(size, was=size.now, now=size.was) for cut in cuts for size in cut.sizes])


@contextmanager
def masked(model: nn.Module, cuts: Sequence[Cut]) -> Iterator[None]:
    """Inside, what reads the units finds zeros in place of those that go."""
    handles = []
    for cut in cuts:
        for axis in cut.group.readers:
            gone = sorted(set(range(axis.size)) - set(axis.staying(cut.kept)))
            handles.append(model.get_submodule(axis.path).register_forward_pre_hook(_zeroing(gone)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def nudged(model: nn.Module, cuts: Sequence[Cut]) -> Iterator[None]:
    """Inside, what reads the units gives numbers that are one unit in the last place larger or smaller, in turn."""
    paths = dict.fromkeys(axis.path for cut in cuts for axis in cut.group.readers)
    handles = [model.get_submodule(path).register_forward_hook(_nudge) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _nudge(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    if not isinstance(output, Tensor):
        return output
    sign = 1 - 2 * (torch.arange(output.shape[-1], device=output.device) % 2)
    return output * (1 + _eps(output) * sign).to(output.dtype)


def _zeroing(gone: list[int]) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0].clone()
        x[..., gone] = 0
        return (x, *args[1:])

    return hook


def staying(cuts: Sequence[Cut]) -> Staying:
    """By tensor and axis, the indices that stay in every cut: a fused tensor is cut by heads and by their groups."""
    found: Staying = {}
    for cut in cuts:
        for axis, staying in cut.staying():
            axes = found.setdefault(axis.name, {})
            if axis.axis in axes:
                both = set(staying)
                staying = [index for index in axes[axis.axis][1] if index in both]
            axes[axis.axis] = (axis, staying)
    return found


def _change(
    model: nn.Module,
    left: Staying,
    change: Callable[[Tensor, int, Tensor, int], Tensor],
) -> None:
    """Replace tensors under all their names."""
    names = _names(model)
    made: dict[int, Tensor] = {}
    tensors = {name: tensor_of(model, name) for name in left}
    for name, axes in left.items():
        tensor = tensors[name]
        others = [other for other in names[id(tensor)] if not _covered(model, other, axes, left)]
        if others:
            raise GraphError.of(
                "S332",
                f"{name} is also {others[0]}, where what is cut has another meaning",
                help="leave the place out with `except`",
            )
        if id(tensor) in made:
            continue
        new = tensor.detach()
        for axis, index in axes.values():
            new = change(new, axis.axis, torch.tensor(index, dtype=torch.long, device=tensor.device), axis.size)
        if isinstance(tensor, nn.Parameter):
            new = nn.Parameter(new, requires_grad=tensor.requires_grad)
        made[id(tensor)] = new
        for other in names[id(tensor)]:
            _put(model, other, new, axes)


def _covered(model: nn.Module, name: str, axes: dict[int, Any], left: Staying) -> bool:
    """Whether another name of a tensor is cut in the same way, or stands in the same module."""
    if name in left:
        return {axis: kept for axis, (_, kept) in left[name].items()} == {a: kept for a, (_, kept) in axes.items()}
    owner = model.get_submodule(name.rpartition(".")[0])
    paths = {each.rpartition(".")[0] for each in left}
    return any(model.get_submodule(path) is owner for path in paths)


def _names(model: nn.Module) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    tables = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    for table in tables:
        for name, tensor in table:
            found.setdefault(id(tensor), []).append(name)
    return found


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its name. Errors: GraphError S332 where there is none."""
    path, _, local = name.rpartition(".")
    module = model.get_submodule(path)
    found: Tensor | None = module._parameters.get(local)
    found = module._buffers.get(local) if found is None else found
    if found is None:
        raise GraphError.of("S332", f"{name} is no tensor of its own, so no part of it can be cut")
    return found


def _rescale(model: nn.Module, cuts: Sequence[Cut], back: bool = False) -> None:
    """Let the norms of fewer channels divide by what they did, or `back`."""
    for each in cuts:
        ratio = each.group.count / len(each.kept)
        for norm in each.group.norms:
            rescaled(model.get_submodule(norm.path), norm, 1 / ratio if back else ratio)


def _put(model: nn.Module, name: str, tensor: Tensor, axes: dict[int, Any]) -> None:
    path, _, local = name.rpartition(".")
    module = model.get_submodule(path)
    (module._parameters if local in module._parameters else module._buffers)[local] = tensor  # type: ignore[assignment]
    for kind, stated in STATED.items():
        if isinstance(module, kind) and local == "weight":
            for axis in axes:
                setattr(module, stated[axis], tensor.shape[axis])
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        module.normalized_shape = tuple(tensor.shape)


def _state(model: nn.Module, sizes: Sequence[Size]) -> None:
    """Set attributes, and fields of configurations: of the common one where all modules of a class agree."""
    module: Any
    for size in sizes:
        if not size.name.startswith(CONFIG):
            module = model.get_submodule(size.path)
            one = isinstance(getattr(module, size.name), tuple)
            setattr(module, size.name, (size.now,) if one else size.now)
    told = {(size.path, size.name): size.now for size in sizes if size.name.startswith(CONFIG)}
    for (path, name), now in told.items():
        module = model.get_submodule(path)
        alike = [other for other, each in model.named_modules() if type(each) is type(module)]
        if not all(told.get((other, name)) == now for other in alike):
            module.config = copy.deepcopy(module.config)
        setattr(module.config, name.removeprefix(CONFIG), now)
