"""The main forms of every verb, each on the place that most of them share: for the table of pairs, and for tests.

`examples.jsonl` stands for a file of examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

FORMS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "adapter": ("adapter bottleneck 2 after ffn", "adapter bottleneck 2 beside ffn"),
        "drop": ("drop layers 1",),
        "freeze": ("freeze norm",),
        "ia3": ("ia3 on attn.v",),
        "instruct": ('instruct "w5 w6"', 'instruct "w7 w8" cached'),
        "lora": ("lora rank 2 on attn.v", "lora rank 2 dora on attn.v", "lora rank 2 init pissa on attn.v"),
        "lottery": ("lottery 50% rounds 2 on attn.v",),
        "moe": ("moe 3 experts on ffn",),
        "optimize": ("optimize adamw lr 0.01",),
        "prefix": ("prefix 2", "prefix 2 gated", "prefix 2 via mlp 3", 'prefix 2 init text "w5 w6"'),
        "prompt": ("prompt 2",),
        "prune": ("prune magnitude 50% on attn.v", "prune magnitude 0% to 50% over 200 steps on attn.v"),
        "prune channels": ("prune channels 50%",),
        "prune heads": ("prune heads 50% on attn",),
        "prune neurons": ("prune neurons 50% on ffn",),
        "ptuning": ("ptuning v1 2 via mlp 3", "ptuning v2 2"),
        "quantize": ("quantize attn.v nf4",),
        "repeat": ("repeat layers 1", "repeat layers 1 silent"),
        "require perplexity": ('require perplexity <= 1.05 of base using "examples.jsonl"',),
        "require size": ("require size < 1 GB",),
        "require trainable": ("require trainable <= 100%",),
        "require zeros": ("require zeros >= 0% on attn.v",),
        "shots": ('shots 1 from "examples.jsonl"',),
        "sparse": ("sparse static 50% on attn.v", "sparse rigl 50% on attn.v"),
        "train": ("train norm", "train attn.v", "train bias add"),
    }
)
