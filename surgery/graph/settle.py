"""What a merge leaves a graph for, and still simplifies: values computed from tensors alone become tensors."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from surgery.graph.lower import lower
from surgery.graph.module import Rewritten, without


class Settling(Rewritten):
    """A rewritten place whose graph may have nodes that `folds_to` a tensor of a name."""

    def settle(self) -> None:
        """Keep as a tensor what is computed from tensors alone, such as the keys and values of a trained network."""
        with torch.no_grad():
            for node in [node for node in self.full.nodes if "folds_to" in node.meta]:
                name = node.meta["folds_to"]
                self.register_parameter(name, nn.Parameter(self._value(node), requires_grad=False))
                with self.full.inserting_before(node):
                    kept = self.full.create_node("get_attr", name, (), {})
                kept.meta["statement"] = node.meta["statement"]
                node.replace_all_uses_with(kept)
                object.__setattr__(self, "added", (*self.added, name))
        for node in reversed(list(self.full.nodes)):
            if "statement" in node.meta and not node.users:
                self.full.erase_node(node)
        used = {
            str(node.target).partition(".")[0] for node in self.full.nodes if node.op in ("get_attr", "call_module")
        }
        for name in [name for name in self.added if name not in used]:
            delattr(self, name)
        object.__setattr__(self, "added", tuple(name for name in self.added if name in used))
        self.graph = lower(without(self.full, self.off))

    def settled(self, name: str) -> Tensor:
        """A tensor by its name, or by the one that it would have after a merge."""
        node = next((node for node in self.full.nodes if node.meta.get("folds_to") == name), None)
        with torch.no_grad():
            return self.get_parameter(name).detach() if node is None else self._value(node)

    def _value(self, node: fx.Node) -> Tensor:
        """The value of a node that depends on tensors alone."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._value)
        value: Tensor = getattr(fx.Interpreter(self, graph=self.full), node.op)(node.target, args, kwargs)
        return value.detach().clone()
