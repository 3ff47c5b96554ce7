"""AdapterHub's `adapters` 1.3.0 given the same parameters: its logits, recorded by adapterhub/record.py, and ours.

Its `houlsby` is our `after attn, ffn`; its bottleneck adapters that stand before the layer norm, our `after ffn`; its
parallel one, which reads the residual stream, is our `beside ffn` where a feed-forward reads just that (BERT).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import surgery
from surgery.compiler import record_of
from tests import zoo

RECORDS = Path(__file__).parent / "adapterhub"
PROGRAMS = {
    "bert-houlsby": "adapter bottleneck 5 swish after attn, ffn",
    "bert-ffn": "adapter bottleneck 5 gelu norm after ffn",
    "bert-parallel": "adapter bottleneck 5 relu beside ffn scale 4",
    "bert-learned": "adapter bottleneck 5 relu beside ffn scale learned",
    "llama-houlsby": "adapter bottleneck 6 swish after attn, ffn",
    "llama-ffn": "adapter bottleneck 6 relu after ffn scale 0.5",
    "gpt2-houlsby": "adapter bottleneck 5 gelu after attn, ffn",
    "t5-houlsby": "adapter bottleneck 4 swish after attn, ffn",
}


def test_every_record_is_compared() -> None:
    assert {path.stem for path in RECORDS.glob("*.safetensors")} == set(PROGRAMS)


@pytest.mark.parametrize("case", PROGRAMS)
def test_logits(case: str) -> None:
    recorded = load_file(RECORDS / f"{case}.safetensors")
    model = zoo.tiny(case.partition("-")[0])
    base = zoo.logits(model, zoo.inputs(model))
    surgery.apply(surgery.parse(PROGRAMS[case]), model)
    record = record_of(model)
    assert record is not None
    stacks = {stack.name: stack.depth for stack in record.plan.anatomy.stacks}
    before = {"encoder": 0, "decoder": stacks.get("encoder", 0)}
    filled = 0
    with torch.no_grad():
        for part in (part for step in record.plan.steps for part in step.parts):
            layer = before[part.stack or ""] + (part.layer or 0)
            edge = model.get_submodule(part.path).get_submodule("surgery_edge")
            for name, parameter in edge.named_parameters():
                parameter.copy_(recorded[f"{layer}.{part.role}.{name.removeprefix('adapter_')}"])
                filled += 1
    assert filled == len(recorded) - 1
    logits = zoo.logits(model, zoo.inputs(model))
    assert (logits - recorded["logits"]).abs().max() <= 1e-6 * recorded["logits"].abs().max()
    assert (logits - base).abs().max() > 0.1
