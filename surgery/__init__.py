"""Say what to change in a pretrained network; have it done, and checked. Names load when first used (PEP 562)."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery.anatomy import study as study
    from surgery.checkpoint.export import export as export
    from surgery.checkpoint.interchange.peft_import import import_peft as import_peft
    from surgery.checkpoint.load import load as load
    from surgery.checkpoint.save import save as save
    from surgery.compiler import activate as activate
    from surgery.compiler import active as active
    from surgery.compiler import apply as apply
    from surgery.compiler import combine as combine
    from surgery.compiler import disabled as disabled
    from surgery.compiler import merge as merge
    from surgery.compiler import parameters as parameters
    from surgery.compiler import plan as plan
    from surgery.compiler import route as route
    from surgery.compiler import unmerge as unmerge
    from surgery.compiler.extract import extract as extract
    from surgery.errors import SurgeryError as SurgeryError
    from surgery.graph.experts import auxiliary_loss as auxiliary_loss
    from surgery.language import load_program as load_program
    from surgery.language import parse as parse
    from surgery.training.lottery import lottery as lottery
    from surgery.training.optimizer import optimizer as optimizer
    from surgery.training.schedule import schedule as schedule
    from surgery.verify import verify as verify

__version__ = "0.1.0"

_HOMES = {
    "SurgeryError": "surgery.errors",
    "activate": "surgery.compiler",
    "active": "surgery.compiler",
    "apply": "surgery.compiler",
    "auxiliary_loss": "surgery.graph.experts",
    "combine": "surgery.compiler",
    "disabled": "surgery.compiler",
    "export": "surgery.checkpoint.export",
    "extract": "surgery.compiler.extract",
    "import_peft": "surgery.checkpoint.interchange.peft_import",
    "load": "surgery.checkpoint.load",
    "load_program": "surgery.language",
    "lottery": "surgery.training.lottery",
    "merge": "surgery.compiler",
    "optimizer": "surgery.training.optimizer",
    "parameters": "surgery.compiler",
    "parse": "surgery.language",
    "plan": "surgery.compiler",
    "route": "surgery.compiler",
    "save": "surgery.checkpoint.save",
    "schedule": "surgery.training.schedule",
    "study": "surgery.anatomy",
    "unmerge": "surgery.compiler",
    "verify": "surgery.verify",
}

__all__ = [
    "SurgeryError", "__version__", "activate", "active", "apply", "auxiliary_loss", "combine", "disabled", "export",
    "extract", "import_peft", "load", "load_program", "lottery", "merge", "optimizer", "parameters", "parse", "plan",
    "route", "save", "schedule", "study", "unmerge", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'surgery' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps `surgery.verify` the function: importing the subpackage of that name would replace it by the subpackage."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
