"""Sparse upcycling on a small real task: a character model goes on as a mixture of experts, and as it was.

    python -m tests.bench.upcycle [--steps 150] [--seeds 3]

Text: the language reference that comes with Python (`pydoc_data.topics`), every tenth topic held out. A dense model is
trained first; then each program goes on from it with the same batches, steps and optimizer.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from typing import Any

import torch
from torch import Tensor

WIDTH, LENGTH, BATCH, HELD_OUT = 64, 64, 16, 64
EXPERTS = 8
TRAIN = "train all layers, embed, norm, head"
PROGRAMS = {
    "dense": TRAIN,
    "8 experts, top 2": f"moe {EXPERTS} experts top 2 balance 0.02 on ffn ; {TRAIN}",
    "8 experts, top 2, no balancing": f"moe {EXPERTS} experts top 2 balance 0 on ffn ; {TRAIN}",
}


def texts() -> tuple[Tensor, Tensor]:
    """Characters to train on and held-out ones, as numbers below 128."""
    from pydoc_data.topics import topics

    parts: tuple[list[str], list[str]] = ([], [])
    for index, (_, text) in enumerate(sorted(topics.items())):
        parts[index % 10 == 0].append(text)
    first, second = (
        torch.tensor([min(ord(letter), 127) for letter in "\n".join(part)], dtype=torch.long) for part in parts
    )
    return first, second


def batch(text: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(count, LENGTH) stretches of a text, wherever they start."""
    starts = torch.randint(len(text) - LENGTH, (count, 1), generator=generator)
    return text[starts + torch.arange(LENGTH)]


def train(model: Any, text: Tensor, steps: int, seed: int) -> None:
    """So many steps of AdamW on what wants gradients."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    model.train()
    for _ in range(steps):
        ids = batch(text, BATCH, generator)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()


@torch.no_grad()
def judge(model: Any, text: Tensor) -> tuple[float, float]:
    """The loss on held-out text in nats a character; the least share of choices of any expert, of all layers."""
    from surgery.graph.experts import mixtures

    read: list[Tensor] = []
    for _, module in mixtures(model):
        module.router.register_forward_hook(lambda module, args, logits: read.append(logits))
    ids = batch(text, HELD_OUT, torch.Generator().manual_seed(0))
    loss = float(model.eval()(input_ids=ids, labels=ids).loss)
    chosen = [logits.flatten(0, -2).topk(2).indices.flatten() for logits in read]
    least = [int(torch.bincount(each, minlength=EXPERTS).min()) / len(each) for each in chosen]
    return loss, min(least, default=1.0)


def main(arguments: list[str] | None = None) -> bool:
    from transformers import LlamaConfig, LlamaForCausalLM

    import surgery

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(arguments)
    learned, held_out = texts()
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    losses: dict[str, list[float]] = {name: [] for name in ("before", *PROGRAMS)}
    shares: dict[str, list[float]] = {name: [] for name in losses}
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        dense = LlamaForCausalLM(config)
        train(dense, learned, options.steps, seed)
        for name in losses:
            model = copy.deepcopy(dense)
            if name in PROGRAMS:
                surgery.apply(surgery.parse(PROGRAMS[name]), model)
                train(model, learned, options.steps, seed + 100)
            loss, share = judge(model, held_out)
            losses[name].append(loss)
            shares[name].append(share)
    print(f"| after {options.steps} more steps, {options.seeds} seeds | held-out loss | spread | least used expert |")
    print("| --- | ---: | ---: | ---: |")
    for name, found in losses.items():
        least = f"{min(shares[name]):.1%}" if "experts" in name else ""
        print(f"| {name} | {statistics.mean(found):.3f} | {max(found) - min(found):.3f} | {least} |")
    dense_, mixed = losses["dense"], losses["8 experts, top 2"]
    return all(b < a for a, b in zip(dense_, mixed, strict=True)) and min(shares["8 experts, top 2"]) > 0.2 / EXPERTS


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
