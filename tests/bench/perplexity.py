"""Perplexity of SmolLM2 on held-out text after half of its linear maps' weights are gone, by several scores.

    python -m tests.bench.perplexity [--samples 64] [--held-out 32]

Text: the language reference that comes with Python (`pydoc_data.topics`), in pieces of 256 tokens; calibration reads
one half of the topics, and the perplexity is of the other. Fails where the order is not the one that the papers report:
SparseGPT below Wanda below magnitude, at 50% and at 2:4 (Sun et al. 2024).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LENGTH = 256
ORDER = ("sparsegpt", "wanda", "magnitude")
PROGRAMS = {
    "dense": None,
    "magnitude 50%": "prune magnitude 50% on all linear",
    "wanda 50%": "prune wanda 50% using {texts} on all linear",
    "sparsegpt 50%": "prune sparsegpt 50% using {texts} on all linear",
    "magnitude 2:4": "prune magnitude 2:4 on all linear",
    "wanda 2:4": "prune wanda 2:4 using {texts} on all linear",
    "sparsegpt 2:4": "prune sparsegpt 2:4 using {texts} on all linear",
}


def pieces(tokenizer: Any, half: int) -> list[list[int]]:
    """Token ids of every other topic, `LENGTH` at a time."""
    from pydoc_data.topics import topics

    chosen = [text for index, (_, text) in enumerate(sorted(topics.items())) if index % 2 == half]
    ids = tokenizer("\n".join(chosen), add_special_tokens=False)["input_ids"]
    return [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH, LENGTH)]


@torch.no_grad()
def perplexity(model: Any, sequences: list[Tensor]) -> float:
    """exp of the mean loss of each next token."""
    return math.exp(sum(float(model(input_ids=ids, labels=ids).loss) for ids in sequences) / len(sequences))


def main(arguments: list[str] | None = None) -> bool:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    import surgery
    from tests.pretrained import smollm2

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--held-out", type=int, default=32)
    options = parser.parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    calibration, held_out = pieces(tokenizer, 0)[: options.samples], pieces(tokenizer, 1)
    stride = len(held_out) // options.held_out
    sequences = [torch.tensor([ids]) for ids in held_out[::stride][: options.held_out]]
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as directory:
        texts = Path(directory) / "calibration.jsonl"
        texts.write_text("\n".join(json.dumps({"input_ids": ids}) for ids in calibration))
        print("| weights | perplexity |\n| --- | ---: |")
        for name, program in PROGRAMS.items():
            model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()
            if program is not None:
                surgery.apply(surgery.parse(program.format(texts=f'"{texts}"')), model)
            found[name] = perplexity(model, sequences)
            print(f"| {name} | {found[name]:.1f} |", flush=True)
    ranked = [[found[f"{score} {amount}"] for score in ORDER] for amount in ("50%", "2:4")]
    return all([found["dense"], *row] == sorted([found["dense"], *row]) for row in ranked)


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
