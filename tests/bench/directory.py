"""Directories larger than one would load: quantized and merged by streaming, side by side with the libraries.

    python -m tests.bench.directory quantize [--layers 22]   # against transformers and bitsandbytes
    python -m tests.bench.directory merge [--layers 22]      # against PEFT, and against a copy of the files
    python -m tests.bench.directory prune [--layers 22]      # alone: the memory of choosing masks

The model is a random bfloat16 Llama (hidden 2048, ffn 5632, 32 heads, 4 of keys and values, vocabulary 32,000) in
shards of 500 MB; 22 layers have 1.1 billion parameters. It is made once, in the cache of `tests/pretrained.py` or in
`--place`. Every contender runs in a process of its own, measured from when everything is imported: seconds, and the
most memory above what it had then. Limits: quantized, a quarter of the time and the same bytes; merged, 0.6 of PEFT's
time and 2.5 times a copy's; less than three times the largest tensor in memory. Pruning: less than 2 GB, all told.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench.measure import high_water
from tests.pretrained import cache

SHARD = 500 * 10**6
QUANTIZE, LORA = "quantize base nf4 double", "lora rank 8 on all linear"


def made(layers: int, place: Path) -> Path:
    """The model's directory, made when it is not there."""
    directory = place / f"llama-{layers}"
    if not (directory / "config.json").exists():
        directory.mkdir(parents=True, exist_ok=True)
        in_a_process(_make, layers, directory)
    return directory


def _make(layers: int, directory: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        if size + 2 * shape.numel() > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += 2 * shape.numel()
    places = {}
    for index, names in enumerate(shards, start=1):
        file = f"model-{index:05}-of-{len(shards):05}.safetensors"
        generator = torch.Generator().manual_seed(index)
        tensors = {name: torch.randn(shapes[name], generator=generator).mul_(0.02).bfloat16() for name in names}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(names, file))
    total = sum(2 * shape.numel() for shape in shapes.values())
    index_file = {"metadata": {"total_size": total}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index_file))
    config.save_pretrained(directory)


# Contenders: a directory -> another one.


def surgery_apply(program: str, source: Path, out: Path) -> None:
    """As the command does it."""
    import surgery
    from surgery.checkpoint.models import load_meta
    from surgery.checkpoint.streaming import stream, whole_because

    loaded = load_meta(str(source))
    plan = surgery.plan(surgery.parse(program), loaded.model)
    assert whole_because(plan, loaded) is None
    stream(plan, source, out, origin=loaded.origin, force=False)


def surgery_merge(source: Path, out: Path) -> None:
    """As the command does it."""
    from surgery.checkpoint.merging import merged_shapes, stream_merge

    shapes = merged_shapes(source)
    assert shapes is not None
    stream_merge(source, shapes, out, force=False)


def transformers_quantize(source: Path, out: Path) -> None:
    """Load as codes, save."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=settings, device_map="cpu", dtype=torch.bfloat16
    )
    model.save_pretrained(out)


def peft_merge(base: Path, adapter: Path, out: Path) -> None:
    """Load, merge, save."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)


def copy(source: Path, out: Path) -> None:
    """The weights, as they are."""
    out.mkdir()
    for path in source.glob("model*.safetensors"):
        shutil.copyfile(path, out / path.name)


def synced_copy(source: Path, out: Path) -> None:
    """The weights, as they are, on the disk: which ours are, so that a crash leaves no torn file."""
    copy(source, out)
    for path in out.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())


# Measuring


def _warm() -> None:
    """Import all that any contender will, and let what is compiled at first be compiled."""
    import bitsandbytes
    import peft
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM
    from transformers.utils import logging

    import surgery
    from surgery.checkpoint import merging, streaming
    from surgery.graph.codes import encode

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    assert all((bitsandbytes, peft, AutoModelForCausalLM, BitsAndBytesConfig, merging, streaming))
    from transformers import LlamaConfig

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tiny = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes)).to(torch.bfloat16)
    encode(torch.randn(64, 64).bfloat16(), "nf4", 64, True)
    surgery.merge(surgery.apply(surgery.parse(LORA), tiny))


def _measured(send: Any, function: Callable[..., object], args: tuple[Any, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if function is not copy:
            _warm()
        gc.collect()
        reset = Path("/proc/self/clear_refs")
        if reset.exists():
            reset.write_text("5")  # the high-water mark starts again
        before, start = high_water(), time.perf_counter()
        function(*args)
        send.send((time.perf_counter() - start, high_water() - before, high_water()))


def in_a_process(function: Callable[..., object], *args: Any) -> tuple[float, int, int]:
    """Seconds, bytes above what was resident when everything was imported, and bytes all told."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(send, function, args))
    process.start()
    send.close()
    try:
        result: tuple[float, int, int] = receive.recv()
    except EOFError:
        raise RuntimeError(f"{function.__name__} died") from None
    finally:
        process.join()
    return result


def same_tensors(one: Path, other: Path) -> tuple[int, list[str]]:
    """How many tensors are byte for byte the same in two directories, and the names of those that are not."""
    from surgery.checkpoint.header import check_checkpoint
    from surgery.checkpoint.source import Source

    same, different = 0, []
    with Source(check_checkpoint(one)) as left, Source(check_checkpoint(other)) as right:
        for name in sorted({*left.infos, *right.infos}):
            both = name in left and name in right
            if both and all(
                bytes(a[1]) == bytes(b[1]) for a, b in zip(left.stretches(name), right.stretches(name), strict=True)
            ):
                same += 1
            else:
                different.append(name)
    return same, different


def compared(
    title: str, contenders: dict[str, tuple[Any, ...]], rounds: int, limits: dict[str, float], most: int
) -> bool:
    """Run the contenders in turns, each into a directory of its own, and print what they took."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    memory: dict[str, list[int]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, (function, *args) in contenders.items():
            shutil.rmtree(args[-1], ignore_errors=True)
            took, used, _ = in_a_process(function, *args)
            seconds[name].append(took)
            memory[name].append(used)
    print(f"\n{title}")
    for name in contenders:
        print(f"  {name:<14}{statistics.median(seconds[name]):7.2f} s {max(memory[name]) / 1e6:8.0f} MB above imports")
    good = max(memory["ours"]) < most
    print(f"  memory of ours: {max(memory['ours']) / most:.2f} of the limit   {'ok' if good else 'OVER'}")
    for name, limit in limits.items():
        ratio = statistics.median(a / b for a, b in zip(seconds["ours"], seconds[name], strict=True))
        good &= ratio <= limit
        print(f"  ours / {name} = {ratio:.3f}   limit {limit:.2f}   {'ok' if ratio <= limit else 'OVER'}")
    return good


def quantize(base: Path, place: Path, rounds: int, most: int, alone: bool) -> bool:
    ours, theirs = place / "quantized", place / "quantized-by-transformers"
    contenders: dict[str, tuple[Any, ...]] = {"ours": (surgery_apply, QUANTIZE, base, ours)}
    if not alone:
        contenders["transformers"] = (transformers_quantize, base, theirs)
    good = compared(f"{QUANTIZE}, {base.name}", contenders, rounds, {} if alone else {"transformers": 0.25}, most)
    if not alone:
        same, different = same_tensors(ours, theirs)
        print(f"  {same} tensors byte for byte the same, {len(different)} not {different[:3]}")
        good &= same > 0 and not different
    return good


def merge(base: Path, place: Path, rounds: int, most: int, alone: bool) -> bool:
    adapted, adapter = place / "adapted", place / "adapter"
    for path in (adapted, adapter):
        shutil.rmtree(path, ignore_errors=True)
    in_a_process(surgery_apply, LORA, base, adapted)
    in_a_process(_train, adapted)
    contenders: dict[str, tuple[Any, ...]] = {"ours": (surgery_merge, adapted, place / "merged")}
    contenders["copy"] = (copy, base, place / "copied")
    contenders["synced copy"] = (synced_copy, base, place / "copied")
    if not alone:
        in_a_process(_export, base, adapted, adapter)
        contenders["peft"] = (peft_merge, base, adapter, place / "merged-by-peft")
    limits = {"copy": 2.5} if alone else {"copy": 2.5, "peft": 0.6}
    good = compared(f"merge of {LORA}, {base.name}", contenders, rounds, limits, most)
    if not alone:
        same, different = same_tensors(place / "merged", place / "merged-by-peft")
        print(f"  {same} tensors byte for byte PEFT's, {len(different)} not (it rounds twice)")
        good &= same > 0
    return good


def _train(adapted: Path) -> None:
    """Stand-in for training: every B gets random numbers, where the file has zeros, and the manifest its digest."""
    import torch
    from safetensors.torch import load_file

    from surgery.checkpoint import tensors as files

    added = {name: tensor.clone() for name, tensor in load_file(adapted / "surgery.safetensors").items()}
    for name, tensor in added.items():
        if name.endswith("lora_B"):
            tensor.copy_(0.02 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))))
    digests = files.write(adapted / "surgery.safetensors", added)
    manifest = json.loads((adapted / "surgery.json").read_text())
    for name, digest in digests.items():
        manifest["tensors"][name]["digest"] = digest
    (adapted / "surgery.json").write_text(json.dumps(manifest))


def _export(base: Path, adapted: Path, adapter: Path) -> None:
    import surgery

    surgery.export(surgery.load(adapted), adapter, to="peft", origin=str(base))


def prune(base: Path, place: Path) -> bool:
    texts = place / "texts.jsonl"
    lines = [{"input_ids": [(7 * row + 31 * column) % 32000 for column in range(64)]} for row in range(8)]
    texts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(f"\n{base.name}, 8 texts of 64 tokens")
    good = True
    for how in (f'wanda 50% using "{texts}"', "magnitude 50% global"):
        shutil.rmtree(place / "pruned", ignore_errors=True)
        took, above, all_told = in_a_process(surgery_apply, f"prune {how} on all linear", base, place / "pruned")
        good &= all_told < 2e9
        said = f"{took:7.2f} s {above / 1e6:8.0f} MB above imports, {all_told / 1e6:.0f} MB all told   limit 2000"
        print(f"  {' '.join(how.split()[:2]):<14} {said}   {'ok' if all_told < 2e9 else 'OVER'}")
    return good


def main(arguments: list[str] | None = None) -> bool:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["quantize", "merge", "prune"])
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--place", type=Path, default=cache() / "bench")
    parser.add_argument("--alone", action="store_true", help="ours only, for sizes that the libraries cannot load")
    options = parser.parse_args(arguments)
    base = made(options.layers, options.place)
    largest = 2 * 32000 * 2048
    print(f"{sum(path.stat().st_size for path in base.iterdir()) / 1e9:.2f} GB, {os.cpu_count()} processors")
    if options.what == "prune":
        return prune(base, options.place)
    run = quantize if options.what == "quantize" else merge
    return run(base, options.place, options.rounds, 3 * largest, options.alone)


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
