"""Compiled models follow the switches, also those that stood otherwise when they were compiled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import surgery
from surgery.verify.bounds import relative_error
from tests import zoo
from tests.trained import trained_under

FED = (zoo.tokens(51),)
COMPILED = (
    "lora rank 2 on attn.q as one\nlora rank 2 dora on attn.v as two",
    "quantize base nf4\nlora rank 2 on attn.q,v as one\nlora rank 2 dropout 10% on ffn as two",
    "quantize base int8\nlora rank 2 on attn.q,v as one\nlora rank 2 dropout 10% on ffn as two",
    "lora rank 2 on attn.q as one\nprefix 3 gated on all layers as two",
)


@pytest.mark.parametrize("program", COMPILED)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_compiled_model_follows_the_switches(family: str, program: str) -> None:
    """off_means_off: `disabled` and `activate` reach code that was compiled before, and so does switching on again."""
    model = trained_under(program, zoo.tiny(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 1}))
    fed = zoo.inputs(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")

    def both() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return tuple(each(**fed, use_cache=False).logits for each in (compiled, model))

    seen = []
    found, wanted = both()
    assert relative_error(found, wanted) <= 1e-5
    seen.append(wanted)
    with surgery.disabled(model):
        found, wanted = both()
        assert torch.equal(found, wanted), "the base to the bit"
        seen.append(wanted)
    for names in (("one",), ("two",)):
        surgery.activate(model, *names)
        found, wanted = both()
        assert relative_error(found, wanted) <= 1e-5
        seen.append(wanted)
    surgery.activate(model)
    found, wanted = both()
    assert relative_error(found, wanted) <= 1e-5
    assert torch.equal(wanted, seen[0])
    assert min(relative_error(a, b) for i, a in enumerate(seen) for b in seen[:i]) > 1e-3, (
        "every switch changes the logits"
    )
    torch._dynamo.reset()


def test_a_model_compiled_while_disabled_wakes_up() -> None:
    """off_means_off: the state at the first call is not baked in either."""
    model = trained_under("lora rank 2 on ffn", zoo.plain("byhand", dtype=torch.float32, depth=1), FED)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    base = zoo.plain("byhand", dtype=torch.float32, depth=1)
    with torch.no_grad():
        with surgery.disabled(model):
            assert torch.equal(compiled(*FED), base(*FED))
        assert relative_error(compiled(*FED), model(*FED)) <= 1e-5
        assert relative_error(compiled(*FED), base(*FED)) > 1e-3
    torch._dynamo.reset()
