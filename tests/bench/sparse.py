"""Sparse training from scratch: static masks, SET and RigL at 80 and 90%, and a lottery ticket against a random one.

    python -m tests.bench.sparse [--steps 360] [--seeds 3] [--processes 2]

Task: the next character of the language reference that comes with Python (`pydoc_data.topics`), by a small decoder
with dense embedding and head. Figures: bits a character on held-out topics, the mean over seeds and the extremes.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from tests import zoo

LENGTH, BATCH, WIDTH, DEPTH = 64, 16, 64, 2
RATE, REWIND = 3e-3, 0.05
WHERE = "on attn + ffn"
SWAPS = "swap 30% every 15 steps until 75%"
PROGRAMS = {
    f"{method} {share}%": f"sparse {method} {share}% {SWAPS if method != 'static' else ''} {WHERE}"
    for share in (80, 90)
    for method in ("static", "set", "rigl")
}
ROUNDS = 3
TICKETS = ("random ticket 80%", "lottery ticket 80%")


@cache
def texts() -> tuple[int, Tensor, Tensor]:
    """Number of characters that there are, and the topics as their numbers: every fifth is held out."""
    from pydoc_data.topics import topics

    pages = [text for _, text in sorted(topics.items())]
    known = sorted(set("".join(pages)))
    number = {character: index for index, character in enumerate(known)}
    parts = ("".join(p for i, p in enumerate(pages) if (i % 5 == 0) == held) for held in (False, True))
    train, held_out = (torch.tensor([number[character] for character in part]) for part in parts)
    return len(known), train, held_out


def batch(text: Tensor, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """The same for the same step, whoever trains."""
    starts = torch.randint(len(text) - LENGTH - 1, (BATCH,), generator=zoo.seeded(seed, f"batch {step}"))
    rows = torch.stack([text[start : start + LENGTH + 1] for start in starts.tolist()])
    return rows[:, :-1], rows[:, 1:]


def loss(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1), labels.flatten())


def fresh(seed: int) -> nn.Module:
    """As torch initialises it; positions stay as they are drawn."""
    torch.manual_seed(seed)
    model = zoo.PlainDecoder(zoo.NanoBlock, texts()[0], WIDTH, 4, 4 * WIDTH, DEPTH, LENGTH)
    model.place.requires_grad_(False)
    return model


def apply(text: str, model: nn.Module, seed: int) -> nn.Module:
    """What the masks leave out is trained as well."""
    program = surgery.parse(f"seed {seed}\n{text}\ntrain all layers\ntrain embed + norm + head")
    return surgery.apply(program, model, example_inputs=(batch(texts()[1], 0, 0)[0],))


def train(model: Any, seed: int, steps: int, start: int = 0, stop: int | None = None) -> None:
    """AdamW, the learning rate falling along a cosine; masks move where the program says so."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.01)
    record = model.__dict__.get("_surgery")
    swaps = record is not None and any(step.operation.verb == "sparse" for step in record.plan.steps)
    schedule = surgery.schedule(model, optimizer, steps=steps) if swaps else None
    model.train()
    for step in range(start, steps if stop is None else stop):
        optimizer.param_groups[0]["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss(model, *batch(texts()[1], seed, step)).backward()
        if schedule is not None:
            schedule.step()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def held_out(model: nn.Module) -> float:
    """Bits a character."""
    text = texts()[2]
    rows = text[: len(text) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)[::4]
    found = [loss(model, part[:, :-1], part[:, 1:]).item() * len(part) for part in rows.split(64)]
    return sum(found) / len(rows) / math.log(2)


def run(work: tuple[str, int, int]) -> float:
    """One line of the table with one seed."""
    name, seed, steps = work
    torch.set_num_threads(1)
    model, early = fresh(seed), round(REWIND * steps)
    if name in PROGRAMS:
        train(apply(PROGRAMS[name], model, seed), seed, steps)
    elif name == "random ticket 80%":
        train(model, seed, steps, 0, early)
        train(apply(f"sparse static 80% budget uniform {WHERE}", model, seed), seed, steps, early)
    elif name == "lottery ticket 80%":
        apply(f"lottery 80% rounds {ROUNDS} rewind {early} steps {WHERE}", model, seed)
        surgery.lottery(model, lambda model, start, stop: train(model, seed, steps, start, stop))
        train(model, seed, steps, early)
    else:
        train(model, seed, steps)
    return held_out(model)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=360)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    names = ["lottery ticket 80%", "random ticket 80%", *PROGRAMS, "dense"]  # the longest first
    works = [(name, seed, options.steps) for name in names for seed in range(options.seeds)]
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        found: dict[tuple[str, int, int], float] = {}
        for work, bits in zip(works, pool.imap(run, works, 1), strict=True):
            found[work] = bits
            print(f"{work[0]}, seed {work[1]}: {bits:.3f}", file=sys.stderr, flush=True)
    print("| network | bits a character | of all seeds |\n| --- | ---: | --- |")
    for name in ("dense", *PROGRAMS, *TICKETS):
        bits = [found[name, seed, options.steps] for seed in range(options.seeds)]
        print(f"| {name} | {statistics.mean(bits):.3f} | {min(bits):.3f} to {max(bits):.3f} |")


if __name__ == "__main__":
    sys.exit(main())
