"""A planted bug, and the models that bugs are tried on."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from surgery.language import parse
from tests.properties.case import Case
from tests.reference_decoder import Shape
from tests.strategies import Model

Patch = pytest.MonkeyPatch


# Their packages export functions of the same names.
planning: Any = importlib.import_module("surgery.compiler.plan")
applying: Any = importlib.import_module("surgery.compiler.apply")
drafting: Any = importlib.import_module("surgery.compiler.drafts")
selecting: Any = importlib.import_module("surgery.anatomy.select")
ODD = Shape(vocabulary=29, width=12, layers=3, heads=3, key_value_heads=1, ffn=21, bias=True)
EVEN = dataclasses.replace(ODD, ffn=22)
FUSED = dataclasses.replace(ODD, fused=True)
BARE = dataclasses.replace(ODD, bias=False)
TIED = dataclasses.replace(ODD, tied=True)
CAUSAL = dataclasses.replace(ODD, attention="causal")


@dataclass(frozen=True)
class Bug:
    """what: the mistake, in words. plant: makes it. law: the one that must fail. text, shape: where it is tried."""

    what: str
    law: str
    plant: Callable[[Patch], None]
    text: str
    shape: Shape = ODD

    def case(self) -> Case:
        return Case(Model(self.shape, seed=1), parse(self.text))


LORA = "lora rank 2 alpha 5 on attn.q,v + ffn.down"
