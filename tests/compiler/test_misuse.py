"""Things in the wrong places, and things of the wrong kind: one error of ours with a way out, the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import surgery
from surgery.errors import SurgeryError
from tests import zoo

PROGRAM = surgery.parse("lora rank 2 on attn.q")
MISUSES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "apply, swapped": ("S100", lambda model: surgery.apply(model, PROGRAM)),
    "apply, a text": ("S100", lambda model: surgery.apply("lora rank 2 on attn.q", model)),  # type: ignore[arg-type]
    "plan, swapped": ("S100", lambda model: surgery.plan(model, PROGRAM)),  # type: ignore[arg-type]
    "plan, a path": ("S200", lambda model: surgery.plan(PROGRAM, "llama")),  # type: ignore[arg-type]
    "parse, a number": ("S100", lambda model: surgery.parse(5)),  # type: ignore[arg-type]
    "parse, bytes": ("S100", lambda model: surgery.parse(b"ia3")),  # type: ignore[arg-type]
    "study, nothing": ("S200", lambda model: surgery.study(None)),  # type: ignore[arg-type]
    "study, a function": ("S200", lambda model: surgery.study(torch.relu)),  # type: ignore[arg-type]
    "merge, untransformed": ("S311", surgery.merge),
    "merge, nothing": ("S311", lambda model: surgery.merge(None)),
    "verify, untransformed": ("S501", surgery.verify),
    "activate, a number": ("S310", lambda model: surgery.activate(surgery.apply(PROGRAM, model), 5)),  # type: ignore[arg-type]
    "optimizer, untransformed": ("S370", surgery.optimizer),
    "schedule, untransformed": ("S370", lambda model: surgery.schedule(model, None)),  # type: ignore[arg-type]
    "a scale beyond every dtype": ("S013", lambda model: surgery.parse("lora rank 2 alpha 1e300 on attn.q")),
    "an adapter's scale": ("S013", lambda model: surgery.parse("adapter bottleneck 2 scale -1e9 after ffn")),
}


@pytest.mark.parametrize(("code", "use"), MISUSES.values(), ids=MISUSES)
def test_misuse_is_said(code: str, use: Callable[[Any], Any]) -> None:
    model = zoo.tiny("llama")
    before = zoo.logits(model, zoo.inputs(model))
    with pytest.raises(SurgeryError) as caught:
        use(model)
    (said,) = caught.value.diagnostics
    assert said.code == code
    assert torch.equal(zoo.logits(model, zoo.inputs(model)), before)


def test_the_way_out() -> None:
    with pytest.raises(SurgeryError, match="the program comes first, then the model"):
        surgery.apply(zoo.tiny("llama"), PROGRAM)
    with pytest.raises(SurgeryError, match=r"surgery\.parse\(text\)"):
        surgery.apply("lora rank 2", zoo.tiny("llama"))  # type: ignore[arg-type]
