"""Planted bugs that laws of what is attached must notice."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery
import surgery.graph.edge
import surgery.graph.fold
import surgery.graph.functions
import surgery.graph.module
import surgery.graph.site
import surgery.operations.adapter
import surgery.operations.ia3
import surgery.operations.lora
import surgery.operations.lora_init
from surgery.graph.affine import RULES, Affine
from surgery.graph.matrix import Sum
from surgery.operations.lora import Lora
from tests.properties.bugs.bug import BARE, FUSED, LORA, Bug, Patch


def _factor_inverted(patch: Patch) -> None:
    patch.setattr(Lora, "factor", property(lambda self: self.rank / self.alpha))


def _rs_forgotten(patch: Patch) -> None:
    patch.setattr(Lora, "factor", property(lambda self: self.alpha / self.rank))


def _a_transposed(patch: Patch) -> None:
    def low_rank(x: Any, a: Tensor, b: Tensor, scale: float) -> Any:
        return F.linear(F.linear(x, a.reshape(a.shape[1], a.shape[0]).t()), b) * scale

    patch.setattr(surgery.graph.functions, "low_rank", low_rank)


def _scale_missing_in_merge(patch: Patch) -> None:
    original = Affine.scaled

    def scaled(self: Affine, factor: Any) -> Affine:
        return self if isinstance(factor, float) else original(self, factor)

    patch.setattr(Affine, "scaled", scaled)


def _bias_merged_twice(patch: Patch) -> None:
    original = Affine.then

    def then(self: Affine, weight: Tensor, bias: Tensor | None = None) -> Affine:
        return original(self, weight, None if bias is None else 2 * bias)

    patch.setattr(Affine, "then", then)


def _merge_without_branch(patch: Patch) -> None:
    patch.setitem(RULES, "add", lambda a, b, **_: a if isinstance(a, Affine) else b)
    patch.setattr(Affine, "__add__", lambda self, other: self)


def _dora_norm_of_the_base(patch: Patch) -> None:
    def ratio(m: Tensor, weight: Tensor, a: Tensor, b: Tensor, factor: float) -> Tensor:
        return m / torch.linalg.vector_norm(weight, dim=1)

    patch.setattr(surgery.operations.lora, "magnitude_ratio", ratio)


def _b_not_zero(patch: Patch) -> None:
    patch.setattr(surgery.graph.site.Site.parameter, "__defaults__", (surgery.operations.lora.normal, None))


def _gate_open(patch: Patch) -> None:
    original = surgery.graph.site.Site.parameter

    def parameter(self: Any, name: str, shape: Any, *rest: Any, **named: Any) -> Any:
        if name == "prefix_gate":
            return original(self, name, shape, lambda tensor, generator: tensor.fill_(0.1))
        return original(self, name, shape, *rest, **named)

    patch.setattr(surgery.graph.site.Site, "parameter", parameter)


def _channels_off_by_one(patch: Patch) -> None:
    original = surgery.graph.site.Site._runs
    patch.setattr(surgery.graph.site.Site, "_runs", lambda self: (original(self) + 1).clamp(max=self.part.shape[0] - 1))


def _channels_ignored(patch: Patch) -> None:
    def add(y: Any, branch: Any, channels: Tensor) -> Any:
        start = torch.arange(len(channels))
        return torch.index_add(y, -1, start, branch)

    patch.setattr(surgery.graph.site, "add_to_channels", add)


def _joint_not_marked(patch: Patch) -> None:
    """A branch that nothing can switch off."""

    def add_to_output(self: Any, branch: Any) -> None:
        self._give(self.call(surgery.graph.site.add_branch, self.output, branch))

    patch.setattr(surgery.graph.site.Site, "add_to_output", add_to_output)


def _branch_in_place(patch: Patch) -> None:
    """Switching back on forgets to, after the first time off."""
    original = surgery.graph.module.Rewritten.route

    def route(self: Any, off: Any, *more: Any) -> None:
        original(self, off or self.off, *more)

    patch.setattr(surgery.graph.module.Rewritten, "route", route)


def _merge_of_half(patch: Patch) -> None:
    """Sums of a merge are taken narrow."""
    original = Sum.block

    def block(self: Sum, *where: Any) -> Tensor:
        return original(self, *where).to(torch.bfloat16).to(self.dtype)

    patch.setattr(Sum, "block", block)


def _factors_start_at_zero(patch: Patch) -> None:
    patch.setattr(surgery.operations.ia3, "ones", lambda vector, generator: vector.zero_())


def _factors_of_other_channels(patch: Patch) -> None:
    def rescale(y: Any, factors: Tensor, channels: Tensor) -> Any:
        start = torch.arange(len(channels))
        return torch.index_copy(y, -1, start, torch.index_select(y, -1, start) * factors)

    patch.setattr(surgery.graph.site, "rescale_channels", rescale)


def _bias_not_scaled_in_merge(patch: Patch) -> None:
    original = Affine.scaled

    def scaled(self: Affine, factor: Any) -> Affine:
        made = original(self, factor)
        made.offset = self.offset
        return made

    patch.setattr(Affine, "scaled", scaled)


def _inner_activation_merged_into_rows(patch: Patch) -> None:
    """Factors of the input are lost where they meet the weight."""
    original = Affine.then

    def then(self: Affine, weight: Tensor, bias: Tensor | None = None) -> Affine:
        self.diagonal = None
        return original(self, weight, bias)

    patch.setattr(Affine, "then", then)


def _added_bias_forgotten_by_the_merge(patch: Patch) -> None:
    patch.setattr(surgery.graph.fold, "_hold", functools.partial(_hold_weights, surgery.graph.fold._hold))


def _hold_weights(original: Any, module: nn.Module, name: str, value: Tensor, site: Any) -> None:
    if name == "weight":
        original(module, name, value, site)


def _up_not_zero(patch: Patch) -> None:
    original = surgery.graph.edge.EdgeSite.parameter

    def parameter(self: Any, name: str, shape: tuple[int, ...], *rest: Any) -> Any:
        filled = (surgery.operations.adapter.kaiming,) if name == "adapter_up_weight" else rest
        return original(self, name, shape, *filled)

    patch.setattr(surgery.graph.edge.EdgeSite, "parameter", parameter)


def _beside_reads_the_output(patch: Patch) -> None:
    patch.setattr(surgery.graph.edge.EdgeSite, "input", property(lambda self: self.output))


def _row_backwards(patch: Patch) -> None:
    original = surgery.graph.edge.chain
    patch.setattr(surgery.graph.edge, "chain", lambda following: original(following)[::-1])


def _adapter_unscaled(patch: Patch) -> None:
    patch.setattr(surgery.operations.adapter.Adapter, "_scaled", lambda self, site, x: x)


def _input_of_before(patch: Patch) -> None:
    """What a sub-layer read the first time is kept for every time."""
    patch.setattr(surgery.graph.edge.Tap, "take", lambda self: self.__dict__.setdefault("first", self.value))


ROW = "adapter bottleneck 3 gelu beside ffn scale 2 then b as a; adapter bottleneck 2 norm after ffn as b"


def _codes_not_made_again(patch: Patch) -> None:
    """The adapter takes its part out of the weight, and the codes stay those of all of it."""
    patch.setattr(surgery.graph.site.Site, "hold_rows", lambda self, rows: None)


def _residual_of_the_weight(patch: Patch) -> None:
    """LoftQ as if codes lost nothing: A and B from the weight, which the codes have as well."""
    original = surgery.operations.lora_init.loftq

    def loftq(site: Any, rank: int, factor: float, turns: int) -> Any:
        weight = surgery.operations.lora_init.wide(site)
        original(site, rank, factor, turns)
        return surgery.operations.lora_init.factors(*torch.linalg.svd(weight, full_matrices=False), rank, factor)

    patch.setattr(surgery.operations.lora, "loftq", loftq)


def _table_backwards(patch: Patch) -> None:
    original = surgery.operations.lora.by_layer
    patch.setattr(surgery.operations.lora, "by_layer", lambda table, *rest: original(table[::-1], *rest))


def _budget_of_the_base_alone(patch: Patch) -> None:
    """The share is taken of twice the parameters."""
    original = surgery.operations.lora.within
    patch.setattr(
        surgery.operations.lora,
        "within",
        lambda budget, parts, parameters, dora: original(budget, parts, 2 * parameters, dora),
    )


def _budget_not_used(patch: Patch) -> None:
    original = surgery.operations.lora.within
    patch.setattr(
        surgery.operations.lora,
        "within",
        lambda *given: {key: max(1, rank - 2) for key, rank in original(*given).items()},
    )


BUGS: tuple[Bug, ...] = (
    Bug("alpha / rank inverted", "formula", _factor_inverted, LORA),
    Bug("`scale rs` scales as usual", "formula", _rs_forgotten, "lora rank 2 alpha 5 scale rs on ffn"),
    Bug("A read transposed", "formula", _a_transposed, LORA),
    Bug("scale missing in the merge", "merge", _scale_missing_in_merge, LORA),
    Bug("bias merged twice", "merged weights", _bias_merged_twice, LORA),
    Bug("branch missing in the merge", "merge", _merge_without_branch, LORA),
    Bug("merge sums taken in 16 bits", "merge", _merge_of_half, LORA),
    Bug("DoRA divides by the base's norm", "formula", _dora_norm_of_the_base, "lora rank 2 dora on attn.o"),
    Bug("B does not start at zero", "identity", _b_not_zero, LORA),
    Bug("W_up does not start at zero", "identity", _up_not_zero, "adapter bottleneck 2 after ffn"),
    Bug("beside reads what is after", "bottlenecks", _beside_reads_the_output, "adapter bottleneck 2 beside ffn"),
    Bug("a row of adapters backwards", "bottlenecks", _row_backwards, ROW),
    Bug("an adapter without its scale", "bottlenecks", _adapter_unscaled, ROW),
    Bug("the input of the run before", "bottlenecks", _input_of_before, ROW),
    Bug("the gate starts open", "identity", _gate_open, "prefix 2 gated on all layers"),
    Bug(
        "codes of the whole weight",
        "starts near",
        _codes_not_made_again,
        "quantize base nf4; lora rank 2 init pissa on ffn",
    ),
    Bug(
        "what codes lose forgotten",
        "starts near",
        _residual_of_the_weight,
        "quantize base nf4; lora rank 2 init loftq on ffn",
    ),
    Bug("a table read backwards", "formula", _table_backwards, "lora rank 1, 2, 3 alpha 4 on attn.q"),
    Bug("a budget of too much", "budgets", _budget_of_the_base_alone, "lora budget 6% on attn.q"),
    Bug("a budget left over", "budgets", _budget_not_used, "lora budget 6% on attn.q"),
    Bug("channels of a fused projection off by one", "formula", _channels_off_by_one, "lora rank 2 on attn.q,v", FUSED),
    Bug("channels of a fused projection ignored", "formula", _channels_ignored, "lora rank 2 on attn.v", FUSED),
    Bug("a branch that cannot be switched off", "off", _joint_not_marked, LORA),
    Bug("off stays off", "off", _branch_in_place, LORA),
    Bug("factors start at zero", "identity", _factors_start_at_zero, "ia3"),
    Bug("factors of a fused projection on other channels", "factors", _factors_of_other_channels, "ia3", FUSED),
    Bug("a merge does not scale the bias", "factors", _bias_not_scaled_in_merge, "ia3"),
    Bug("a merge forgets the scaled input", "factors", _inner_activation_merged_into_rows, "ia3 on ffn.down"),
    Bug("an added bias is not merged", "factors", _added_bias_forgotten_by_the_merge, "train bias add", BARE),
)
