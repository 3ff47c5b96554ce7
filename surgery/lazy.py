"""Heavy modules as stand-ins that import on first use, so that a method is one file and `surgery check` needs no torch.

importlib's own LazyLoader would put a hollow `torch` into `sys.modules`, where others take it for an imported one.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any


class LazyModule(ModuleType):
    """Looks every attribute up in the module it stands for, importing it the first time."""

    def __getattr__(self, name: str) -> Any:
        if name == "__path__":  # `import a.b` of a stand-in asks for it; that must not import the real one
            raise AttributeError(name)
        return getattr(importlib.import_module(self.__name__), name)

    def __dir__(self) -> list[str]:
        return dir(importlib.import_module(self.__name__))


def lazy(name: str) -> ModuleType:
    """The module itself when something has imported it already, else a stand-in for it."""
    return sys.modules.get(name) or LazyModule(name)


if TYPE_CHECKING:
    import torch as torch
    from torch.nn import functional as functional

    from surgery.graph import codes as codes
    from surgery.graph import functions as functions
else:
    codes = lazy("surgery.graph.codes")
    functions = lazy("surgery.graph.functions")
    torch = lazy("torch")
    functional = lazy("torch.nn.functional")
