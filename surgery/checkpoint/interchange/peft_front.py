"""What comes in front of tokens as PEFT writes it: one table without a path, of rows or of keys and values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from surgery.anatomy.entries import INSIDE
from surgery.checkpoint.interchange.peft_place import Adapter, Place, cannot
from surgery.compiler.record import record_of

KEY = "prompt_embeddings"


def prompt(model: nn.Module, places: Sequence[Place]) -> Adapter:
    """Rows in front of the first layer, (n, width); what a network makes of them, since PEFT drops it. Errors: S451."""
    (entry, *others) = [place for place in places if place.part.kind == "entry"]
    statement, verb = entry.step.statement, entry.operation.verb
    if others:
        raise cannot(f"`{statement}` and `{others[0].step.statement}` are one adapter", "give them names")
    two = _two_stacks(model)
    if two and entry.part.role != INSIDE:
        raise cannot(
            f"`{statement}` is in front of the decoder, and PEFT's prompts are the encoder's",
            "`prefix` on the decoder can be exported",
        )
    if entry.part.role == INSIDE and not two and type(model).__name__.endswith("ForSequenceClassification"):
        raise cannot(
            f"`{statement}` leaves the first token what is classified, and in PEFT the prompt's first row is",
            "adapt the model with lora or ia3",
        )
    rows = entry.tensor(verb).contiguous()
    config = {
        "peft_type": "PROMPT_TUNING" if verb == "prompt" else "P_TUNING",
        "num_virtual_tokens": rows.shape[0],
        "token_dim": rows.shape[1],
        "num_transformer_submodules": 1,
        "num_layers": _depth(model, entry.part.stack),
        "num_attention_heads": 1,  # PEFT asks for it, and does not use it
    }
    if verb == "ptuning":
        config |= {"encoder_reparameterization_type": "MLP", "encoder_hidden_size": rows.shape[1]}
    return Adapter(config, {KEY: rows})


def prefix(model: nn.Module, places: Sequence[Place]) -> Adapter:
    """Keys and values in front of every layer's: (n, layers * 2 * heads * width), keys before values. Errors: S451."""
    statement = places[0].step.statement
    heads = places[0].part.heads
    if getattr(places[0].operation, "gated", False):
        raise cannot(f"PEFT has no format for the gate of `{statement}`", "train it without `gated`")
    two = _two_stacks(model)
    if two and any(place.part.stack != "decoder" or place.part.role == "cross" for place in places):
        raise cannot(
            f"`{statement}` is not on the decoder's own attention alone, as PEFT's prefixes are", "say `in decoder`"
        )
    depth = _depth(model, places[0].part.stack)
    if [place.part.layer for place in places] != list(range(depth)) or heads is None:
        raise cannot(f"`{statement}` does not act on every layer, as PEFT's prefixes do", "select all layers")
    if any(place.part.heads != heads for place in places):
        raise cannot(f"layers under `{statement}` differ in their heads", "PEFT keeps all in one tensor")
    if heads.key_width != heads.value_width:
        raise cannot("keys and values differ in width", "PEFT keeps both in one tensor")
    both = [torch.stack([place.tensor("prefix_key"), place.tensor("prefix_value")]) for place in places]
    if two:  # of two stacks, PEFT reads every other pair; what is between them nobody reads
        both = [each for pair in both for each in (pair, torch.zeros_like(pair))]
    table = torch.stack(both).permute(3, 0, 1, 2, 4).flatten(1).contiguous()
    config = {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": table.shape[0],
        "num_layers": len(both),
        "num_attention_heads": heads.key_value,
        "token_dim": heads.key_value * heads.key_width,
        "num_transformer_submodules": 2 if two else 1,
        "encoder_hidden_size": heads.key_value * heads.key_width,
        "prefix_projection": False,
    }
    return Adapter(config, {KEY: table})


def pairs(table: Tensor, layers: int, submodules: int, depth: int) -> Tensor:
    """Keys and values (depth, 2, heads * width, n) that PEFT's model reads of a table made for so many layers.

    With two submodules it repeats the table, and cuts it in fours of which the first two are for self-attention.
    """
    cut = table.t().reshape(layers, 2, -1, table.shape[0])
    return cut[[submodules * layer % layers for layer in range(depth)]]


def _two_stacks(model: nn.Module) -> bool:
    record = record_of(model)
    return record is not None and {"encoder", "decoder"} <= {stack.name for stack in record.plan.anatomy.stacks}


def _depth(model: nn.Module, name: str | None) -> int:
    record = record_of(model)
    stacks = () if record is None else record.plan.anatomy.stacks
    return next((stack.depth for stack in stacks if stack.name == name), 0)
