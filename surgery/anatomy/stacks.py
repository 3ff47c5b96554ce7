"""Layers and stacks: membership in the model's lists of layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from surgery.anatomy.shadow import is_layer


@dataclass(frozen=True)
class Place:
    """Where a path stands: in layer `layer` of the stack of lists known as `stack` (the path of its first list)."""

    stack: str
    layer: int


class Lists:
    """The outermost lists of layers of a model. Lists of equal length side by side in one module are one stack."""

    def __init__(self, model: nn.Module) -> None:
        self.members: dict[str, dict[str, int]] = {}
        self.stack_of: dict[str, str] = {}
        beside: list[tuple[str, nn.Module]] = []

        def visit(path: str, module: nn.Module) -> None:
            if holds_layers(module):
                self.members[path] = layers_of(module)
                return
            if isinstance(module, nn.ModuleList):
                beside.append((path, module))
            for name, child in module.named_children():
                visit(f"{path}.{name}" if path else name, child)

        visit("", model)
        side_by_side: dict[tuple[str, int], str] = {}
        for path, members in self.members.items():
            self.stack_of[path] = side_by_side.setdefault((path.rpartition(".")[0], len(members)), path)
        # A list of bare modules (norms, projections) beside a list of layers goes with it.
        for path, module in beside:
            stack = side_by_side.get((path.rpartition(".")[0], len(module._modules)))
            if stack is not None:
                self.members[path] = {name: index for index, name in enumerate(module._modules)}
                self.stack_of[path] = stack
        self.places: dict[str, Place | None] = {}

    def place(self, path: str) -> Place | None:
        """The layer that a module path lies in; None outside every stack."""
        if path not in self.places:
            self.places[path] = self.look(path)
        return self.places[path]

    def look(self, path: str) -> Place | None:
        for prefix, members in self.members.items():
            if path.startswith(f"{prefix}." if prefix else ""):
                index = members.get(path[len(prefix) + 1 if prefix else 0 :].partition(".")[0])
                if index is not None:
                    return Place(self.stack_of[prefix], index)
        return None

    def depth(self, stack: str) -> int:
        return len(self.members[stack])

    def single(self, stack: str) -> bool:
        """Whether each layer of the stack is one module."""
        return list(self.stack_of.values()).count(stack) == 1


def layers_of(container: nn.Module) -> dict[str, int]:
    """Layer index by name: all members of a ModuleList, the layers among the members of a Sequential."""
    names = [
        name
        for name, child in container._modules.items()
        if isinstance(container, nn.ModuleList) or (child is not None and is_layer(child))
    ]
    return {name: index for index, name in enumerate(names)}


def holds_layers(module: nn.Module) -> bool:
    """A list of modules that have submodules of their own; a Sequential only where two of them are of one class."""
    members = [child for child in module._modules.values() if child is not None]
    if isinstance(module, nn.ModuleList):
        return bool(members) and any(is_layer(child) for child in members)
    if isinstance(module, nn.Sequential):
        kinds = [type(child) for child in members if is_layer(child)]
        return len(kinds) >= 2 and len(set(kinds)) < len(kinds)
    return False
