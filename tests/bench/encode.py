"""The 4-bit encoder against bitsandbytes' own on a CPU, 4096 x 4096 bfloat16.

    python -m tests.bench.encode [--rounds 9]

Limit: a tenth of bitsandbytes' time, with the same bytes.
"""

from __future__ import annotations

import argparse
import sys

import torch

from surgery.graph.codes import encode
from tests.bench.measure import alternate, table


def main(arguments: list[str] | None = None) -> bool:
    import bitsandbytes.functional as bnb

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(arguments)
    weight = (0.02 * torch.randn(4096, 4096)).bfloat16()
    good = True
    for format in ("nf4", "fp4"):
        ours, theirs = (
            encode(weight, format, 64, True)[0],
            bnb.quantize_4bit(weight, blocksize=64, quant_type=format)[0],
        )
        good &= torch.equal(ours, theirs)
        contenders = {
            "bitsandbytes": lambda kind=format: bnb.quantize_4bit(weight, blocksize=64, quant_type=kind),
            "ours": lambda kind=format: encode(weight, kind, 64, False),
        }
        limits = {("ours", "bitsandbytes"): 0.1}
        good &= table(f"{format}, 4096 x 4096 bfloat16", alternate(contenders, options.rounds), limits)
    return good


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
