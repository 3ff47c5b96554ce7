"""Every method, on SmolLM2: a training step of ours, of PEFT's, and of the frozen model.

    python -m tests.bench.methods [--rounds 9] [--only ia3 prefix] [--threads 1] [--no-memory]

Limit: at most PEFT's time and peak memory. The ratio to the frozen model's own forward and input-gradient backward
stands beside it; adapters, which PEFT has not, have that alone.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch

from tests import zoo
from tests.bench.lora import SIZES, base, trainer
from tests.bench.measure import alternate, keep_pages, peak, table

LIMITS = {("ours", "peft"): 1.0, ("ours", "frozen"): float("inf"), ("peft", "frozen"): float("inf")}
PROGRAMS = {
    "lora": "lora rank 8 on all linear",
    "dora": "lora rank 8 dora on all linear",
    "ia3": "ia3 on attn.k,v + ffn.down",
    "prefix": "prefix 20 on all layers",
    "prefix-mlp": "prefix 20 via mlp 576 on all layers",
    "prompt": "prompt 20 init normal",
    "ptuning-mlp": "ptuning v1 20 via mlp 128",
    "ptuning-lstm": "ptuning v1 20 via lstm 128",
    "adapter": "adapter bottleneck 64 relu after attn, ffn",
}
ALONE = ("adapter",)


def configuration(method: str) -> Any:
    """PEFT's configuration of the same method and sizes."""
    import peft

    task: Any = {"task_type": "CAUSAL_LM"}
    virtual: Any = {**task, "num_virtual_tokens": 20}
    makers: dict[str, Callable[[], Any]] = {
        "lora": lambda: peft.LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", **task),
        "dora": lambda: peft.LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", use_dora=True, **task),
        "ia3": lambda: peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **task
        ),
        "prefix": lambda: peft.PrefixTuningConfig(**virtual),
        "prefix-mlp": lambda: peft.PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=576, **virtual),
        "prompt": lambda: peft.PromptTuningConfig(prompt_tuning_init="RANDOM", **virtual),
        "ptuning-mlp": lambda: peft.PromptEncoderConfig(
            encoder_reparameterization_type="MLP", encoder_hidden_size=128, **virtual
        ),
        "ptuning-lstm": lambda: peft.PromptEncoderConfig(
            encoder_reparameterization_type="LSTM", encoder_hidden_size=128, **virtual
        ),
    }
    return makers[method]()


def contender(name: str, method: str) -> Any:
    """`frozen`, `peft` or `ours`, ready to train by that method."""
    made = base("smollm2")
    if name == "peft":
        from peft import get_peft_model

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return get_peft_model(made, configuration(method)).train()
    if name == "ours":
        import surgery

        return surgery.apply(surgery.parse(PROGRAMS[method]), made).train()
    return made


def one_run(name: str, method: str) -> None:
    """What the memory figure is measured on: three training steps."""
    torch.set_num_threads(1)
    made = contender(name, method)
    step = trainer(name, made, zoo.tokens(base_vocabulary(made), *SIZES["smollm2"]))
    for _ in range(3):
        step()


def base_vocabulary(made: Any) -> int:
    """Number of tokens of a model, in PEFT's wrapper or not."""
    return int(getattr(made, "base_model", made).config.vocab_size)


def main(arguments: list[str] | None = None) -> bool:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+", choices=list(PROGRAMS), default=list(PROGRAMS))
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args(arguments)
    keep_pages()
    torch.set_num_threads(options.threads)
    good = True
    for method in options.only:
        names = [name for name in ("frozen", "peft", "ours") if name != "peft" or method not in ALONE]
        made = {name: contender(name, method) for name in names}
        batch = zoo.tokens(base_vocabulary(made["frozen"]), *SIZES["smollm2"])
        steps = {name: trainer(name, model, batch) for name, model in made.items()}
        good &= table(f"{method}: {PROGRAMS[method]}", alternate(steps, options.rounds), LIMITS)
        if options.memory:
            used = {name: peak(one_run, name, method) for name in made}
            print("\n" + "\n".join(f"  {name:<10} peak {size / 2**20:7.0f} MB" for name, size in used.items()))
            good &= method in ALONE or used["ours"] <= 1.01 * used["peft"]
    return good


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
