"""Studies every causal, masked and sequence-to-sequence text model type of transformers and writes down what was found.

`python tests/sweep/driver.py [-o RESULTS.jsonl] [-j 2] [TYPE ...]`: default configurations cut to two layers, on the
meta device, one process for each model so that none can take the others down.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import multiprocessing
import os
import queue
import signal
import sys
import time
import traceback
import warnings
from typing import Any

DEPTHS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
    "num_encoder_layers", "num_decoder_layers",
)  # fmt: skip
SECONDS = 240


def model_types() -> list[tuple[str, str, str]]:
    """(task, model type, class name) of every text model type."""
    from transformers.models.auto import modeling_auto as auto

    tasks = {
        "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "masked": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "seq2seq": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    }
    return [(task, kind, names if isinstance(names, str) else names[0])
            for task, table in tasks.items() for kind, names in table.items()]  # fmt: skip


def shorten(config: Any, depth: int = 2) -> None:
    """Two layers instead of many, in this configuration and those inside it; lists with one entry a layer follow."""
    old: set[int] = set()
    for name in DEPTHS:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > depth:
            old.add(value)
            try:
                setattr(config, name, depth)
            except (AttributeError, TypeError, ValueError, NotImplementedError):
                continue
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) in old:
            setattr(config, name, value[:depth])
        elif hasattr(value, "to_dict") and hasattr(value, "model_type"):
            shorten(value, depth)


def build(task: str, kind: str, class_name: str) -> Any:
    """The model type's class from its default configuration, cut short, its parameters on the meta device."""
    import transformers
    from transformers import CONFIG_MAPPING
    from transformers.initialization import no_init_weights

    from surgery.checkpoint.weightless import weightless

    autos = {"causal": "AutoModelForCausalLM", "masked": "AutoModelForMaskedLM", "seq2seq": "AutoModelForSeq2SeqLM"}
    config = CONFIG_MAPPING[kind]()
    if task == "causal" and hasattr(config, "is_decoder"):
        config.is_decoder = True
    whole = copy.deepcopy(config)
    shorten(config)
    for chosen in (config, whole):
        try:
            with weightless(), no_init_weights():
                return getattr(transformers, autos[task]).from_config(chosen).eval()
        except (KeyError, IndexError):
            # Some configuration names its layers one by one: leave it whole.
            if chosen is whole:
                raise
    return None


def examine(task: str, kind: str, class_name: str) -> dict[str, Any]:
    """One row of the table."""
    row: dict[str, Any] = {"task": task, "type": kind}
    from surgery.anatomy.study import study

    start = time.process_time()
    try:
        model = build(task, kind, class_name)
    except Exception as error:
        return {**row, "status": "not built", "why": f"{type(error).__name__}: {error}".split("\n")[0][:200]}
    row["built"] = round(time.process_time() - start, 2)
    start = time.process_time()
    try:
        anatomy = study(model)
    except Exception as error:
        known = type(error).__name__ == "ModelError"
        row["trace"] = traceback.format_exc()[-1500:]
        row["seconds"] = round(time.process_time() - start, 2)
        return {**row, "status": "not exported" if known else "crashed", "why": str(error).replace("\n", " ")[:400]}
    row["seconds"] = round(time.process_time() - start, 2)
    row["stacks"] = [(stack.name, stack.path, stack.depth) for stack in anatomy.stacks]
    row["parts"] = [part.to_json() for part in anatomy.parts]
    return {**row, "status": "studied"}


def worker(todo: Any, done: Any) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.simplefilter("ignore")
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()

    def late(signum: int, frame: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} seconds")

    signal.signal(signal.SIGALRM, late)
    while True:
        item = todo.get()
        if item is None:
            return
        signal.alarm(SECONDS)
        try:
            row = examine(*item)
        except BaseException as error:
            row = {"task": item[0], "type": item[1], "status": "crashed", "why": repr(error)[:300]}
        signal.alarm(0)
        done.put(row)


def sweep(items: list[tuple[str, str, str]], processes: int = 2, each: Any = None) -> list[dict[str, Any]]:
    """Rows for all items, in their order; a process that dies is a row of its own. `each` gets rows as they come."""
    context = multiprocessing.get_context("spawn")
    todo, done = context.Queue(), context.Queue()
    for item in [*items, *[None] * processes]:
        todo.put(item)
    workers = [context.Process(target=worker, args=(todo, done), daemon=True) for _ in range(processes)]
    for process in workers:
        process.start()
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    while len(rows) < len(items) and (any(process.is_alive() for process in workers) or not done.empty()):
        try:
            row = done.get(timeout=5)
        except queue.Empty:
            continue
        rows[row["task"], row["type"]] = row
        if each is not None:
            each(row)
        print(f"\r{len(rows)}/{len(items)} {row['type']:40}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    missing = {"status": "crashed", "why": "the process died"}
    return [rows.get((task, kind), {"task": task, "type": kind, **missing}) for task, kind, _ in items]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("types", nargs="*")
    parser.add_argument("-o", "--output", default="-")
    parser.add_argument("-j", "--processes", type=int, default=2)
    options = parser.parse_args()
    items = [item for item in model_types() if not options.types or item[1] in options.types]
    with contextlib.ExitStack() as stack:
        out = sys.stdout if options.output == "-" else stack.enter_context(open(options.output, "w"))
        sweep(items, options.processes, lambda row: print(json.dumps(row), file=out, flush=True))


if __name__ == "__main__":
    main()
