"""Putting a model back as it was when what changes its modules fails halfway."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

STORES = ("_parameters", "_buffers", "_modules")


@contextmanager
def unharmed(model: nn.Module) -> Iterator[None]:
    """Whatever is raised inside, the model then has the modules, tensors, attributes and configuration it had before.

    Tensors that were written into stay written: what runs inside replaces them instead.
    """
    modules = list(model.modules())
    held = [
        (module, module.__class__, dict(vars(module)), {name: dict(vars(module)[name]) for name in STORES})
        for module in modules
    ]
    configs = [(config, dict(vars(config))) for config in configurations(model)]
    try:
        yield
    except BaseException:
        for module, cls, attributes, stores in held:
            module.__class__ = cls
            vars(module).clear()
            vars(module).update(attributes)
            for name, store in stores.items():
                vars(module)[name].clear()
                vars(module)[name].update(store)
        for config, fields in configs:
            vars(config).clear()
            vars(config).update(fields)
        raise


def configurations(model: nn.Module) -> list[Any]:
    """Every configuration object that a transformers model and its modules hold, the model's own first."""
    found: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if hasattr(value, "to_dict") and hasattr(value, "model_type"):
                found.setdefault(id(value), value)
    return list(found.values())
