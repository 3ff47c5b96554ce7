"""What the tests of structured pruning share: reference decoders that were cut, and what must hold of any cut model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import surgery
from surgery.compiler.record import record_of
from tests import zoo
from tests.reference_decoder import ReferenceDecoder, Shape, reference_decoder

TOKENS = zoo.tokens(61, 2, 6)

shapes = st.builds(
    lambda heads, groups, each, **said: Shape(
        width=heads * groups * each, heads=heads * groups, key_value_heads=groups, **said
    ),
    heads=st.integers(2, 3),
    groups=st.integers(1, 3),
    each=st.sampled_from((2, 4)),
    layers=st.just(2),
    ffn=st.integers(15, 40),
    positions=st.sampled_from(("rotary", "learned")),
    attention=st.sampled_from(("causal", "masked", "hand")),
    gated=st.booleans(),
    fused=st.booleans(),
    bias=st.booleans(),
    tied=st.booleans(),
)


def decoder(program: str = "", shape: Shape | None = None, seed: int = 0) -> ReferenceDecoder:
    model = reference_decoder(shape, seed)
    return surgery.apply(surgery.parse(program), model, example_inputs=(TOKENS,)) if program else model


@torch.no_grad()
def run(model: nn.Module) -> Tensor:
    found: Tensor = model(TOKENS)
    return found


def largest(scores: Tensor, count: int) -> list[int]:
    """The indices of so many of the largest, in order; of equal ones the last."""
    numbers = scores.tolist()
    order = sorted(range(len(numbers)), key=lambda index: (numbers[index], index))
    return sorted(order[len(numbers) - count :])


def texts(lines: Iterable[Sequence[int]], directory: Path) -> Path:
    """A calibration file of token numbers."""
    path = directory / "calibration.jsonl"
    path.write_text("".join(json.dumps({"input_ids": [*ids]}) + "\n" for ids in lines))
    return path


def generates_alike(small: Any, whole: Any, fed: zoo.Inputs) -> None:
    """The same tokens with a cache and without, and as the masked whole's."""
    asked = {"max_new_tokens": 4, "do_sample": False}
    cached = small.generate(**fed, use_cache=True, **asked)
    assert torch.equal(cached, small.generate(**fed, use_cache=False, **asked))
    assert torch.equal(cached, whole.generate(**fed, use_cache=True, **asked))


def loaded_again(small: Any, fed: zoo.Inputs, place: Path) -> Any | None:
    """Saved, loaded with the same bits; and by transformers alone, None where the record says that it cannot."""
    found = zoo.logits(small, fed)
    surgery.save(small, place)
    assert torch.equal(zoo.logits(surgery.load(place), fed), found)
    record = record_of(small)
    assert record is not None
    if record.shape != "config":
        assert record.shape == "replay"
        return None
    loaded, told = type(small).from_pretrained(place, output_loading_info=True)
    assert not told["missing_keys"] | told["unexpected_keys"] | told["mismatched_keys"]
    assert torch.equal(zoo.logits(loaded.eval(), fed), found)
    return loaded
