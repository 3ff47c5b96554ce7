"""PEFT's prompts and prefixes as statements: rows in front of the first layer, or keys and values in front of all."""

from __future__ import annotations

from torch import Tensor, nn

from surgery.anatomy import study
from surgery.anatomy.entries import INSIDE, with_entries
from surgery.anatomy.parts import Anatomy
from surgery.checkpoint.interchange.peft_files import Given, cannot
from surgery.checkpoint.interchange.peft_front import KEY, pairs
from surgery.compiler.record import record_of


def prompt(given: Given, model: nn.Module) -> dict[str, dict[tuple[str, str], Tensor]]:
    """Of a model with two stacks, PEFT reads the encoder's rows only, whatever it keeps. Errors: S452."""
    n = given.count("num_virtual_tokens")
    anatomy = with_entries(_anatomy(model), model)
    entries = [part for part in anatomy.parts if part.kind == "entry"]
    if not entries:
        raise cannot(f"{anatomy.model} has no entry that rows could be put in front of")
    entry = next((part for part in entries if part.role == INSIDE), entries[-1])
    if given.config.get("task_type") == "SEQ_CLS" and entry.role == INSIDE:
        raise cannot(
            f"`{given.where}` classifies by the first row of its prompt; ours are taken out before",
            "load it with PEFT",
        )
    table = _table(given)
    if table.shape[0] < n or table.shape[0] % n:
        raise cannot(f"`{given.where}` has {table.shape[0]} rows, and the configuration says {n}")
    if given.method == "PROMPT_TUNING":
        words, name = f"prompt {n} init normal", "prompt"
    else:
        words, name = f"ptuning v1 {n}", "ptuning"
    return {words: {(entry.path, name): table[:n]}}


def prefix(given: Given, model: nn.Module) -> dict[str, dict[tuple[str, str], Tensor]]:
    """Of a model with two stacks, PEFT puts it on the decoder's own attention only. Errors: S452."""
    n, layers, heads = (given.count(name) for name in ("num_virtual_tokens", "num_layers", "num_attention_heads"))
    submodules, table = given.config.get("num_transformer_submodules") or 1, _table(given)
    width, left = divmod(table.shape[1], layers * 2 * heads)
    if table.shape[0] != n or left:
        raise cannot(
            f"`{given.where}` has a table of {table.shape[0]} x {table.shape[1]}, and the configuration says {n} "
            f"positions, {layers} layers and {heads} heads"
        )
    anatomy = _anatomy(model)
    two = {"encoder", "decoder"} <= {stack.name for stack in anatomy.stacks}
    if submodules not in (1, 2) or (submodules == 2) != two:
        raise cannot(f"`{given.where}` is for a model of {submodules} stacks", "is it this base's adapter?")
    calls = [part for part in anatomy.parts if part.kind == "attention" and part.role == "attn"]
    calls = [part for part in calls if part.stack == "decoder"] if two else calls
    if not two and layers != len(calls):
        raise cannot(f"`{given.where}` is for {layers} layers, and this base has {len(calls)} with attention")
    cut = pairs(table, layers, submodules, len(calls)).unflatten(2, (heads, width)).transpose(-1, -2)
    tensors: dict[tuple[str, str], Tensor] = {}
    for part, (key, value) in zip(calls, cut, strict=True):
        tensors |= {(part.path, "prefix_key"): key, (part.path, "prefix_value"): value}
    return {f"prefix {n} on all layers{' in decoder' if two else ''}": tensors}


def _table(given: Given) -> Tensor:
    if list(given.tensors) != [KEY] or given.tensors[KEY].dim() != 2:
        raise cannot(
            f"`{given.where}` has {', '.join(given.tensors) or 'no tensors'}, where a table `{KEY}` is expected",
            "load it with PEFT",
        )
    return given.tensors[KEY]


def _anatomy(model: nn.Module) -> Anatomy:
    record = record_of(model)
    return study(model) if record is None else record.plan.anatomy
