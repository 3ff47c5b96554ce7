"""torch-pruning told what `prune neurons`, `prune heads` and `prune channels` find out: which maps write the units.

Its scores are made ours: sums of |w| over all that belongs to a unit, not normalised. What it needs by hand is here,
too: attention in separate products (through the fused one it cannot follow heads that share keys), the numbers of heads
that it leaves behind in the model, the tie between embeddings and head that it breaks, and a share of widths where
heads alone should go (with none it cuts nothing).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

TOKENS = 16  # what it traces the model with


@dataclass(frozen=True)
class Units:
    """A program, and the same for torch-pruning."""

    kind: Literal["neurons", "heads", "channels"]
    program: str
    share: float
    writers: tuple[str, ...]  # ends of the paths of the maps that write the units


CASES = {
    "smollm2": (
        Units("neurons", "prune neurons 25% on ffn", 0.25, ("gate_proj", "up_proj")),
        Units("heads", "prune heads 33% query nearest on attn", 1 / 3, ("q_proj", "k_proj", "v_proj")),
        Units("channels", "prune channels 25%", 0.25, ("o_proj", "down_proj")),
    ),
    "minilm": (  # its channels are its output: S135
        Units("neurons", "prune neurons 25% on ffn", 0.25, ("intermediate.dense",)),
        Units("heads", "prune heads 25% on attn", 0.25, ("query", "key", "value")),
    ),
}


def prune(model: Any, fed: dict[str, Tensor], units: Units) -> None:
    """Cut the units out of `model`, a transformers model, in place."""
    import torch_pruning

    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")
    linear = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    chosen = {path: module for path, module in linear.items() if path.endswith(units.writers)}
    assert chosen
    counts = {module: _heads(path, model.config) for path, module in chosen.items() if units.kind == "heads"}
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        {key: value[:, :TOKENS] for key, value in fed.items()},
        torch_pruning.importance.GroupMagnitudeImportance(
            p=1,
            group_reduction="sum",
            normalizer=None,
            target_types=[nn.Linear, nn.Embedding, nn.LayerNorm],
            bias=True,
        ),
        pruning_ratio=units.share,
        ignored_layers=[module for path, module in linear.items() if path not in chosen],
        output_transform=_tensors,
        num_heads=counts,
        prune_num_heads=units.kind == "heads",
        prune_head_dims=False,
        head_pruning_ratio=units.share,
    )
    pruner.step()
    model.set_attn_implementation(attention)
    model.tie_weights()
    for module in model.modules():
        if units.kind == "heads" and hasattr(module, "num_key_value_groups"):
            module.num_key_value_groups = pruner.num_heads[module.q_proj] // pruner.num_heads[module.k_proj]


def _heads(path: str, config: Any) -> int:
    shared = path.endswith(("k_proj", "v_proj"))
    count: int = config.num_key_value_heads if shared else config.num_attention_heads
    return count


def _tensors(found: Any) -> tuple[Tensor, ...]:
    """All outputs: a map that none of them needs keeps its width, and the model no longer runs."""
    return tuple(value for value in found.values() if isinstance(value, Tensor))
