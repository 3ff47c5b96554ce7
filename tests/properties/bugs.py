"""Planted bugs: small changes to the code that somebody could make, each with the law that must notice.

A bug is a function that patches, a case, and the name of the law that kills it. A law that holds without the patch and
fails with it guards against that mistake; one that holds with it guards against nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery.checkpoint.load
import surgery.compiler.required
import surgery.graph.attention
import surgery.graph.attention_text
import surgery.graph.codes
import surgery.graph.depth
import surgery.graph.edge
import surgery.graph.entry
import surgery.graph.experts
import surgery.graph.fold
import surgery.graph.functions
import surgery.graph.module
import surgery.graph.perplexity
import surgery.graph.recurrent
import surgery.graph.site
import surgery.graph.soft
import surgery.graph.soft_entry
import surgery.language.format
import surgery.language.source
import surgery.operations.adapter
import surgery.operations.freeze
import surgery.operations.ia3
import surgery.operations.lora
import surgery.operations.lora_init
import surgery.operations.lottery
import surgery.operations.options
import surgery.operations.prefix
import surgery.operations.prune
import surgery.operations.sparse
import surgery.operations.subnetwork
import surgery.training.masks
import surgery.training.optimizer
import surgery.training.pages
import surgery.training.schedule
from surgery.graph.affine import RULES, Affine
from surgery.graph.matrix import Sum
from surgery.language import parse
from surgery.operations.base import Operation
from surgery.operations.lora import Lora
from tests.properties.laws import Case
from tests.properties.requiring import HELD_OUT
from tests.reference_decoder import Shape
from tests.strategies import Model

Patch = pytest.MonkeyPatch
# Their packages export functions of the same names.
planning: Any = importlib.import_module("surgery.compiler.plan")
applying: Any = importlib.import_module("surgery.compiler.apply")
drafting: Any = importlib.import_module("surgery.compiler.drafts")
selecting: Any = importlib.import_module("surgery.anatomy.select")

ODD = Shape(vocabulary=29, width=12, layers=3, heads=3, key_value_heads=1, ffn=21, bias=True)
EVEN = dataclasses.replace(ODD, ffn=22)
FUSED = dataclasses.replace(ODD, fused=True)
BARE = dataclasses.replace(ODD, bias=False)
TIED = dataclasses.replace(ODD, tied=True)
CAUSAL = dataclasses.replace(ODD, attention="causal")


@dataclass(frozen=True)
class Bug:
    """what: the mistake, in words. plant: makes it. law: the one that must fail. text, shape: where it is tried."""

    what: str
    law: str
    plant: Callable[[Patch], None]
    text: str
    shape: Shape = ODD

    def case(self) -> Case:
        return Case(Model(self.shape, seed=1), parse(self.text))


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


def _backward_without_scale(patch: Patch) -> None:
    original = surgery.graph.functions.LowRankLinear.forward

    def forward(ctx: Any, *args: Any) -> Tensor:
        y: Tensor = original(ctx, *args)
        ctx.scale = 1.0
        return y

    patch.setattr(surgery.graph.functions.LowRankLinear, "forward", staticmethod(forward))


def _backward_in_place(patch: Patch) -> None:
    """The backward pass scales the parameter itself."""
    original = surgery.graph.functions.LowRankLinear.backward

    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.saved_tensors[3].data.mul_(ctx.scale)
        return original(ctx, *gradients)

    patch.setattr(surgery.graph.functions.LowRankLinear, "backward", staticmethod(backward))


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


def _prefix_without_its_mask(patch: Patch) -> None:
    def mask(mask: Tensor | None, query: Tensor, key: Tensor, causal: Any, positions: int) -> Tensor | None:
        wide = torch.ones(query.shape[-2], key.shape[-2] + positions, dtype=torch.bool).tril()
        return wide if mask is None or mask.dtype == torch.bool else None

    patch.setattr(surgery.graph.attention, "prefixed_mask", mask)


def _prefix_hidden(patch: Patch) -> None:
    original = surgery.graph.attention.prefixed_mask

    def mask(mask: Tensor | None, query: Tensor, key: Tensor, causal: Any, positions: int) -> Tensor | None:
        made = original(mask, query, key, causal, positions)
        assert made is not None
        made[..., 0] = False
        return made

    patch.setattr(surgery.graph.attention, "prefixed_mask", mask)


def _prefix_unmasks_the_future(patch: Patch) -> None:
    patch.setattr(surgery.graph.attention, "prefixed_mask", lambda *_: None)


def _prefix_behind(patch: Patch) -> None:
    from surgery.graph.attention_math import like

    def prepend(states: Tensor, prefix: Tensor, heads: int) -> Tensor:
        return torch.cat((states, like(prefix, states, heads)), dim=-2)

    patch.setattr(surgery.graph.attention, "prepend", prepend)


def _positions_not_shifted(patch: Patch) -> None:
    patch.setattr(surgery.graph.entry.Shift, "__call__", lambda self, *_: None)


def _heads_not_repeated(patch: Patch) -> None:
    """Key-value heads repeated in the wrong order: 0 1 0 1 for 0 0 1 1."""
    original = Tensor.repeat_interleave

    def like(prefix: Tensor, states: Tensor, heads: int) -> Tensor:
        wide = prefix.repeat(states.shape[1] // prefix.shape[0], 1, 1)
        return wide.to(states.dtype).expand(states.shape[0], -1, -1, -1)

    assert original is not None
    patch.setattr(surgery.graph.attention_math, "like", like)


def _one_tie_too_many(patch: Patch) -> None:
    def largest(score: Tensor, share: float) -> Tensor:
        count = round(share * score.numel())
        return score > score.flatten().kthvalue(max(count, 1)).values

    patch.setattr(surgery.operations.prune, "largest", largest)


def _share_of_what_stays(patch: Patch) -> None:
    original = surgery.operations.prune.largest
    patch.setattr(surgery.operations.prune, "largest", lambda score, share: original(score, 1 - share))


def _smallest_stay(patch: Patch) -> None:
    original = surgery.operations.prune.largest
    patch.setattr(surgery.operations.prune, "largest", lambda score, share: original(-score, share))


def _pattern_along_the_output(patch: Patch) -> None:
    original = surgery.operations.prune.pattern
    patch.setattr(surgery.operations.prune, "pattern", lambda score, ratio: original(score.t(), ratio).t())


def _zeros_forgotten(patch: Patch) -> None:
    patch.setattr(surgery.graph.site.Site, "zero_out", lambda self, bits: None)


def _block_boundary_off_by_one(patch: Patch) -> None:
    original = surgery.graph.codes.encode

    def encode(weight: Tensor, *options: Any) -> Any:
        return original(weight.flatten().roll(1).view_as(weight), *options)

    patch.setattr(surgery.graph.codes, "encode", encode)


def _wrong_block_size(patch: Patch) -> None:
    original = surgery.graph.codes.encode
    patch.setattr(surgery.graph.codes, "encode", lambda w, form, block, double: original(w, form, 2 * block, double))


def _quantized_before_pruned(patch: Patch) -> None:
    order = ("shrink", "quantize", "mask", "route", "attach", "train", "schedule")
    patch.setattr(planning, "PHASES", order)


def _tied_weight_split(patch: Patch) -> None:
    original = surgery.graph.module.Rewritten.build.__func__

    def build(cls: Any, root: nn.Module, *rest: Any) -> Any:
        if isinstance(root._parameters.get("weight"), nn.Parameter):
            root._parameters["weight"] = nn.Parameter(root.weight.detach().clone(), requires_grad=False)
        return original(cls, root, *rest)

    patch.setattr(surgery.graph.module.Rewritten, "build", classmethod(build))


def _channels_off_by_one(patch: Patch) -> None:
    original = surgery.graph.site.Site._runs
    patch.setattr(surgery.graph.site.Site, "_runs", lambda self: (original(self) + 1).clamp(max=self.part.shape[0] - 1))


def _channels_ignored(patch: Patch) -> None:
    def add(y: Any, branch: Any, channels: Tensor) -> Any:
        start = torch.arange(len(channels))
        return torch.index_add(y, -1, start, branch)

    patch.setattr(surgery.graph.site, "add_to_channels", add)


def _last_layer_off_by_one(patch: Patch) -> None:
    original = selecting.indices

    def indices(selector: Any, depth: int) -> Any:
        moved = {
            name: value + 1 if value is not None and value < -1 else value
            for name, value in (("first", selector.first), ("last", selector.last))
        }
        return original(dataclasses.replace(selector, **moved), depth)

    patch.setattr(selecting, "indices", indices)


def _range_without_its_end(patch: Patch) -> None:
    original = selecting.indices
    patch.setattr(selecting, "indices", lambda selector, depth: list(original(selector, depth))[:-1] or [0])


def _default_not_copied(patch: Patch) -> None:
    original = Operation.__post_init__

    def post_init(self: Any) -> None:
        original(self)
        if isinstance(self, Lora) and self.alpha == self.rank:
            object.__setattr__(self, "alpha", 16.0)

    patch.setattr(Operation, "__post_init__", post_init)


def _comment_dropped(patch: Patch) -> None:
    original = surgery.language.format._aligned
    patch.setattr(surgery.language.format, "_aligned", lambda lines: original([(text, None) for text, _ in lines]))


def _span_off_by_one(patch: Patch) -> None:
    original = surgery.language.source.Source.line_column

    def line_column(self: Any, offset: int) -> tuple[int, int]:
        line, column = original(self, offset)
        return line, column + 1

    patch.setattr(surgery.language.source.Source, "line_column", line_column)


def _conflicts_not_seen(patch: Patch) -> None:
    patch.setattr(planning, "conflicts", lambda steps: ())


def _one_seed_for_all(patch: Patch) -> None:
    patch.setattr(surgery.graph.site, "seed_of", lambda *words: 7)


def _seed_by_counting(patch: Patch) -> None:
    counter = iter(range(10**6))
    patch.setattr(surgery.graph.site, "seed_of", lambda *words: next(counter))


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


def _base_still_trained(patch: Patch) -> None:
    original = nn.Parameter.requires_grad_
    patch.setattr(nn.Parameter, "requires_grad_", lambda self, wanted=True: original(self, True))


def _statement_not_written(patch: Patch) -> None:
    patch.setattr(surgery.graph.site.Site, "_ours", lambda self, node: node)


def _loaded_without_the_last_bit(patch: Patch) -> None:
    original = surgery.checkpoint.load.put

    def put(held: Any, tensor: Tensor) -> None:
        original(held, tensor.bfloat16().to(tensor.dtype) if tensor.is_floating_point() else tensor)

    patch.setattr(surgery.checkpoint.load, "put", put)


def _copies_share(patch: Patch) -> None:
    """A deep copy that keeps the original's trained tensors."""
    original = surgery.graph.module.Rewritten.__deepcopy__

    @functools.wraps(original)
    def deepcopy(self: Any, memo: dict[int, Any]) -> Any:
        for name, parameter in self._parameters.items():
            if name in self.added:
                memo[id(parameter)] = parameter
        return original(self, memo)

    patch.setattr(surgery.graph.module.Rewritten, "__deepcopy__", deepcopy)


def _merge_of_half(patch: Patch) -> None:
    """Sums of a merge are taken narrow."""
    original = Sum.block

    def block(self: Sum, *where: Any) -> Tensor:
        return original(self, *where).to(torch.bfloat16).to(self.dtype)

    patch.setattr(Sum, "block", block)


def _prompt_read_where_its_tokens_stand(patch: Patch) -> None:
    """Positions are shifted by the prompt while it is read itself."""
    original = surgery.graph.soft.Front._set

    def shifted(self: Any, now: str | None, waiting: dict[str, int]) -> None:
        original(self, now, waiting)
        for amounts in self.amounts:
            amounts.less = 0

    patch.setattr(surgery.graph.soft.Front, "_set", shifted)


def _prompts_in_another_order(patch: Patch) -> None:
    patch.setattr(surgery.graph.soft, "order", lambda prompt: (-prompt[0], prompt[1]))


def _text_one_short(patch: Patch) -> None:
    original = surgery.graph.attention_text.token_ids
    patch.setattr(surgery.graph.attention_text, "token_ids", lambda tokenizer, text: original(tokenizer, text)[:-1])


def _kept_values_are_keys(patch: Patch) -> None:
    original = surgery.graph.soft.States.forward

    def forward(self: Any, key: Tensor, value: Tensor, *stored: Tensor) -> Any:
        found = original(self, key, value, *stored)
        return (found[0], found[0]) if stored and self.of not in self.reading.waiting else found

    patch.setattr(surgery.graph.soft.States, "forward", forward)


def _lstm_in_one_direction(patch: Patch) -> None:
    original = surgery.graph.recurrent.lstm

    def lstm(x: Tensor, hidden: int, *weights: Tensor) -> Tensor:
        return torch.cat((original(x, hidden, *weights)[:, :hidden], x.new_zeros(len(x), hidden)), 1)

    patch.setattr(surgery.graph.recurrent, "lstm", lstm)


def _network_folds_to_its_input(patch: Patch) -> None:
    original = surgery.graph.soft_entry.EntrySite.folds_to

    def folds_to(self: Any, name: str, node: Any) -> Any:
        original(self, name, node.args[0])
        return node

    patch.setattr(surgery.graph.soft_entry.EntrySite, "folds_to", folds_to)


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


def _freeze_forgotten(patch: Patch) -> None:
    patch.setattr(surgery.operations.freeze.Freeze, "freezes", False)


def _whole_modules_trained(patch: Patch) -> None:
    """The weight beside a bias, the bias beside a weight."""

    def declare(plan: Any, model: nn.Module) -> None:
        for step in plan.steps:
            for part in step.parts:
                if step.operation.trains(part):
                    model.get_submodule(part.path).requires_grad_(True)

    patch.setattr(applying, "declare", declare)


def _trained_weight_without_its_mask(patch: Patch) -> None:
    patch.setattr(surgery.graph.functions, "masked", lambda weight, bits: weight)
    patch.setattr(surgery.operations.subnetwork.functions, "masked", lambda weight, bits: weight)


def _added_bias_forgotten_by_the_merge(patch: Patch) -> None:
    patch.setattr(surgery.graph.fold, "_hold", functools.partial(_hold_weights, surgery.graph.fold._hold))


def _hold_weights(original: Any, module: nn.Module, name: str, value: Tensor, site: Any) -> None:
    if name == "weight":
        original(module, name, value, site)


def _trained_values_drawn_again(patch: Patch) -> None:
    patch.setattr(drafting, "ours", lambda standing: {})


def _norms_from_before_the_mask(patch: Patch) -> None:
    patch.setattr(applying, "restarting", lambda *_: ())


def _too_late_not_noticed(patch: Patch) -> None:
    patch.setattr(importlib.import_module("surgery.compiler.again"), "too_late", lambda *_: ())


def _overlaps_counted_twice(patch: Patch) -> None:
    costing: Any = importlib.import_module("surgery.compiler.cost")
    original = costing.count
    patch.setattr(costing, "count", lambda steps, model: sum(original([step], model) for step in steps))


def _state_that_does_not_start_at_zero(patch: Patch) -> None:
    original = surgery.training.pages.Pages.zeros
    patch.setattr(surgery.training.pages.Pages, "zeros", lambda self, *args: original(self, *args).fill_(0.01))


def _vectors_left_out(patch: Patch) -> None:
    original = surgery.training.optimizer.groups
    patch.setattr(
        surgery.training.optimizer,
        "groups",
        lambda operation, tensors: original(operation, [tensor for tensor in tensors if tensor.dim() > 1]),
    )


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


def _just_dropped_grow(patch: Patch) -> None:
    all_but = surgery.operations.prune.all_but

    def swapped(mask: Tensor, size: Tensor, growth: Tensor, share: float) -> Tensor:
        kept = int(mask.sum())
        count = min(round(share * kept), mask.numel() - kept)
        stays = all_but(mask.numel() - kept + count, size.masked_fill(~mask, -1))
        return stays | all_but(mask.numel() - count, growth.masked_fill(stays, -1))

    patch.setattr(surgery.operations.sparse, "swapped", swapped)


def _moments_not_cleared(patch: Patch) -> None:
    patch.setattr(surgery.training.schedule, "forget", lambda *_: None)


def _one_moment_cleared(patch: Patch) -> None:
    """Momentum alone, as peers do; the mean of squares stays."""
    original = surgery.training.schedule.forget

    def forget(optimizer: Any, weight: Tensor, keep: Tensor) -> None:
        squares = optimizer.state[weight].get("exp_avg_sq") if weight in optimizer.state else None
        held = None if squares is None else squares.clone()
        original(optimizer, weight, keep)
        if squares is not None:
            squares.copy_(held)

    patch.setattr(surgery.training.schedule, "forget", forget)


def _swap_at_the_end_too(patch: Patch) -> None:
    original = surgery.operations.sparse.Sparse.turns
    patch.setattr(
        surgery.operations.sparse.Sparse, "turns", lambda self, step, last: original(self, step, last and last + 1)
    )


def _end_one_step_early(patch: Patch) -> None:
    original = surgery.operations.sparse.Sparse.ending
    patch.setattr(surgery.operations.sparse.Sparse, "ending", lambda self, steps: original(self, steps) - 1)


def _cosine_inverted(patch: Patch) -> None:
    original = surgery.operations.sparse.Sparse.share
    patch.setattr(
        surgery.operations.sparse.Sparse,
        "share",
        lambda self, step, last: (self.swap or 0.3) - original(self, step, last),
    )


def _dense_gradient_not_asked(patch: Patch) -> None:
    patch.setattr(surgery.training.masks.MaskedWeight, "ask", lambda self, dense: None)


def _loaded_while_asking(patch: Patch) -> None:
    """The gradient of every weight is given for ever, since it was when the model was saved."""
    patch.setattr(surgery.training.masks, "close", lambda model: None)
    patch.setattr(surgery.training.schedule.Schedule, "_ask", _asks_once)


def _asks_once(self: Any) -> None:
    for work in self.works:
        for each in work.weights:
            if self.count:
                each.ask(True)


def _step_beside_the_swap(patch: Patch) -> None:
    """Gradients are left for the optimizer where the swap should take the place of its step."""
    original = surgery.training.schedule.Schedule._turn

    def turn(self: Any, work: Any) -> bool:
        held = [(each.weight, each.weight.grad) for each in work.weights]
        changed = original(self, work)
        for weight, gradient in held:
            weight.grad = gradient
        return changed

    patch.setattr(surgery.training.schedule.Schedule, "_turn", turn)


def _linear_for_cubic(patch: Patch) -> None:
    patch.setattr(surgery.operations.prune, "cubic", lambda first, last, part: first + (last - first) * part)


def _rewound_to_the_end(patch: Patch) -> None:
    """Weights are pruned and not put back."""
    patch.setattr(importlib.import_module("surgery.training.lottery"), "parameters", lambda model: {})


def _rounds_of_equal_size(patch: Patch) -> None:
    """The same share of the whole each round, for the same share of what is left."""

    def settled(self: Any, step: int) -> Any:
        amount = self.amount * step / self.rounds
        return surgery.operations.prune.Prune(score="magnitude", amount=amount, global_=self.global_)

    patch.setattr(surgery.operations.lottery.Lottery, "settled", settled)


RIGL = "sparse rigl 60% swap 50% every 2 steps on ffn"
GRADUAL = "prune magnitude 10% to 80% over 9 steps every 2 steps on ffn"
TICKET = "lottery 75% rounds 2 rewind 3 steps on ffn"
LORA = "lora rank 2 alpha 5 on attn.q,v + ffn.down"


def _copies_share_their_tensors(patch: Patch) -> None:
    patch.setattr(surgery.graph.depth.copy, "deepcopy", lambda layer, memo: layer)


def _copies_are_loud(patch: Patch) -> None:
    patch.setattr(surgery.graph.depth, "zero_rows", lambda module, part: None)
    patch.setattr(surgery.graph.depth, "check_silent", lambda paths, shaping: None)


def _one_layer_too_many_dropped(patch: Patch) -> None:
    original = surgery.graph.depth.reorder
    patch.setattr(surgery.graph.depth, "reorder", lambda shaping, stack, order: original(shaping, stack, order[:-1]))


def _shares_of_all_experts(patch: Patch) -> None:
    """The weights of the chosen experts are not divided by their sum."""

    def route(self: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
        shares = torch.softmax(self.router(tokens), dim=-1)
        self.loss = None
        top, chosen = shares.topk(self.routing.top, dim=-1)
        return top, chosen

    patch.setattr(surgery.graph.experts.MixtureOfExperts, "route", route)


def _tokens_come_back_in_another_order(patch: Patch) -> None:
    original = surgery.graph.experts.MixtureOfExperts._sorted
    patch.setattr(
        surgery.graph.experts.MixtureOfExperts, "_sorted", lambda self, *args: original(self, *args).roll(1, 0)
    )


def _balance_inverted(patch: Patch) -> None:
    original = surgery.graph.experts.MixtureOfExperts._loss
    patch.setattr(surgery.graph.experts.MixtureOfExperts, "_loss", lambda self, *args: -original(self, *args))


def _bounds_are_outside(patch: Patch) -> None:
    original = surgery.operations.options.Comparison.holds

    def holds(self: Any, found: float, base: float | None = None) -> bool:
        return original(self, found, base) and found != self.limit(base)

    patch.setattr(surgery.operations.options.Comparison, "holds", holds)


def _tokens_see_themselves(patch: Patch) -> None:
    def loss(logits: Tensor, ids: Tensor) -> tuple[float, int]:
        losses = F.cross_entropy(logits, ids[0], reduction="none")
        return float(losses.sum()), len(losses)

    patch.setattr(surgery.graph.perplexity, "_loss", loss)


def _refused_and_changed(patch: Patch) -> None:
    patch.setattr(surgery.compiler.required, "_changed", lambda plan, model: [])


BUGS: tuple[Bug, ...] = (
    Bug("alpha / rank inverted", "formula", _factor_inverted, LORA),
    Bug("`scale rs` scales as usual", "formula", _rs_forgotten, "lora rank 2 alpha 5 scale rs on ffn"),
    Bug("A read transposed", "formula", _a_transposed, LORA),
    Bug("scale missing in the merge", "merge", _scale_missing_in_merge, LORA),
    Bug("bias merged twice", "merged weights", _bias_merged_twice, LORA),
    Bug("branch missing in the merge", "merge", _merge_without_branch, LORA),
    Bug("merge sums taken in 16 bits", "merge", _merge_of_half, LORA),
    Bug("scale missing in the backward pass", "gradients", _backward_without_scale, LORA),
    Bug("the backward pass writes to a parameter", "gradients", _backward_in_place, LORA),
    Bug("DoRA divides by the base's norm", "formula", _dora_norm_of_the_base, "lora rank 2 dora on attn.o"),
    Bug("B does not start at zero", "identity", _b_not_zero, LORA),
    Bug("W_up does not start at zero", "identity", _up_not_zero, "adapter bottleneck 2 after ffn"),
    Bug("beside reads what is after", "bottlenecks", _beside_reads_the_output, "adapter bottleneck 2 beside ffn"),
    Bug("a row of adapters backwards", "bottlenecks", _row_backwards, ROW),
    Bug("an adapter without its scale", "bottlenecks", _adapter_unscaled, ROW),
    Bug("the input of the run before", "bottlenecks", _input_of_before, ROW),
    Bug("the gate starts open", "identity", _gate_open, "prefix 2 gated on all layers"),
    Bug("prefix without its mask", "soft equals hard", _prefix_without_its_mask, "prefix 3 on all layers"),
    Bug("one position of the prefix hidden", "soft equals hard", _prefix_hidden, "prefix 3 on all layers"),
    Bug("the prefix unmasks later tokens", "causal", _prefix_unmasks_the_future, "prefix 3 on all layers"),
    Bug("prefix behind the keys", "soft equals hard", _prefix_behind, "prefix 3 on all layers", CAUSAL),
    Bug("a prompt read where its tokens stand", "texts", _prompt_read_where_its_tokens_stand, "prefix 3 on all layers"),
    Bug("prompts in another order", "texts", _prompts_in_another_order, "prefix 3 on all layers"),
    Bug("a text one token short", "texts", _text_one_short, "prefix 3 on all layers"),
    Bug("kept values are keys", "texts", _kept_values_are_keys, "prefix 3 on all layers"),
    Bug("an LSTM in one direction", "made prompts", _lstm_in_one_direction, "prefix 3 on all layers"),
    Bug("a network folds to its input", "made prompts", _network_folds_to_its_input, "prefix 3 on all layers"),
    Bug("positions not shifted", "soft equals hard", _positions_not_shifted, "prefix 3 on all layers"),
    Bug(
        "key-value heads repeated in the wrong order",
        "soft equals hard",
        _heads_not_repeated,
        "prefix 3 on all layers",
        dataclasses.replace(ODD, width=24, heads=4, key_value_heads=2),
    ),
    Bug("`>` for `>=` at the threshold", "zeros", _one_tie_too_many, "prune magnitude 50% on ffn"),
    Bug("the share is what stays", "zeros", _share_of_what_stays, "prune magnitude 30% on ffn"),
    Bug("the smallest weights stay", "zeros", _smallest_stay, "prune magnitude 50% on ffn"),
    Bug("pattern along the wrong axis", "zeros", _pattern_along_the_output, "prune magnitude 1:2 on ffn", EVEN),
    Bug("pruned weights are not zeroed", "zeros", _zeros_forgotten, "prune magnitude 50% on ffn"),
    Bug("what has just gone may come back", "sparse training", _just_dropped_grow, RIGL),
    Bug("moments are not cleared", "sparse training", _moments_not_cleared, RIGL),
    Bug("momentum alone is cleared", "sparse training", _one_moment_cleared, RIGL),
    Bug("a swap at the end step", "sparse training", _swap_at_the_end_too, f"{RIGL[:-7]} until 10 steps on ffn"),
    Bug("the end one step early", "sparse training", _end_one_step_early, RIGL),
    Bug("the cosine inverted", "sparse training", _cosine_inverted, RIGL),
    Bug("no gradient of what is at zero", "sparse training", _dense_gradient_not_asked, RIGL),
    Bug("a step beside the swap", "sparse training", _step_beside_the_swap, RIGL),
    Bug("the gradient of every weight after loading", "resumed", _loaded_while_asking, RIGL),
    Bug("a share that grows by the same each time", "sparse training", _linear_for_cubic, GRADUAL),
    Bug("a ticket that is not rewound", "tickets", _rewound_to_the_end, TICKET),
    Bug("rounds that cut the same number", "tickets", _rounds_of_equal_size, TICKET),
    Bug("block boundary off by one", "codes", _block_boundary_off_by_one, "quantize base nf4"),
    Bug("block size doubled", "codes", _wrong_block_size, "quantize base nf4"),
    Bug(
        "quantized before it is pruned",
        "codes",
        _quantized_before_pruned,
        "quantize base nf4; prune magnitude 50% on ffn",
    ),
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
    Bug("a tied weight split", "ties", _tied_weight_split, "lora rank 2 on embed", TIED),
    Bug("channels of a fused projection off by one", "formula", _channels_off_by_one, "lora rank 2 on attn.q,v", FUSED),
    Bug("channels of a fused projection ignored", "formula", _channels_ignored, "lora rank 2 on attn.v", FUSED),
    Bug("layer -2 off by one", "plans count", _last_layer_off_by_one, "lora rank 1 on attn.q in layers -2"),
    Bug(
        "a range of layers without its end",
        "plans count",
        _range_without_its_end,
        "lora rank 1 on attn.q in layers 0..1",
    ),
    Bug("a default changed", "defaults", _default_not_copied, LORA),
    Bug("a comment dropped", "comments stay", _comment_dropped, LORA),
    Bug("a span off by one", "errors point", _span_off_by_one, LORA),
    Bug("conflicts not seen", "conflicts", _conflicts_not_seen, LORA),
    Bug("every tensor has the same seed", "seeds", _one_seed_for_all, LORA),
    Bug("seeds by counting", "order", _seed_by_counting, "lora rank 1 on attn.q; lora rank 1 on ffn.up"),
    Bug("a branch that cannot be switched off", "off", _joint_not_marked, LORA),
    Bug("off stays off", "off", _branch_in_place, LORA),
    Bug("the base is still trained", "frame", _base_still_trained, LORA),
    Bug("nodes do not say whose they are", "graphs", _statement_not_written, LORA),
    Bug("loaded through 16 bits", "round trip", _loaded_without_the_last_bit, LORA),
    Bug("a deep copy shares what is trained", "copies", _copies_share, LORA),
    Bug("factors start at zero", "identity", _factors_start_at_zero, "ia3"),
    Bug("factors of a fused projection on other channels", "factors", _factors_of_other_channels, "ia3", FUSED),
    Bug("a merge does not scale the bias", "factors", _bias_not_scaled_in_merge, "ia3"),
    Bug("a merge forgets the scaled input", "factors", _inner_activation_merged_into_rows, "ia3 on ffn.down"),
    Bug("an added bias is not merged", "factors", _added_bias_forgotten_by_the_merge, "train bias add", BARE),
    Bug("`freeze` freezes nothing", "trained", _freeze_forgotten, "train all layers; freeze ffn"),
    Bug("`train bias` trains the weights as well", "trained", _whole_modules_trained, "train bias"),
    Bug(
        "a trained weight forgets its mask",
        "trained",
        _trained_weight_without_its_mask,
        "train ffn; prune magnitude 50% on ffn",
    ),
    Bug(
        "what two statements train is counted twice",
        "plans count",
        _overlaps_counted_twice,
        "train ffn; train layers -1",
    ),
    Bug(
        "paged state does not start at zero",
        "optimizer",
        _state_that_does_not_start_at_zero,
        "train ffn; optimize adamw paged lr 0.01",
    ),
    Bug(
        "a second program draws anew what was trained",
        "again",
        _trained_values_drawn_again,
        "lora rank 2 on attn.q; lora rank 1 on attn.q as second",
    ),
    Bug(
        "norms from before a second program's mask",
        "again",
        _norms_from_before_the_mask,
        "lora rank 2 dora on attn.q; prune magnitude 50% on attn.q",
    ),
    Bug(
        "what comes too late is not noticed",
        "again",
        _too_late_not_noticed,
        "quantize base nf4; prune magnitude 50% on ffn",
    ),
    Bug("the optimizer leaves vectors out", "optimizer", _vectors_left_out, "train ffn; optimize adamw lr 0.01"),
    Bug(
        "copies of layers share their tensors",
        "layers",
        _copies_share_their_tensors,
        "repeat layers 1 ; lora rank 1 on attn.q",
    ),
    Bug("silent copies are not silent", "layers", _copies_are_loud, "repeat layers 1 silent ; lora rank 1 on attn.q"),
    Bug(
        "one layer too many is dropped", "layers", _one_layer_too_many_dropped, "drop layers 0 ; lora rank 1 on attn.q"
    ),
    Bug("experts' weights do not sum to one", "experts", _shares_of_all_experts, "moe 4 experts top 2 on ffn"),
    Bug(
        "tokens come back to another place", "experts", _tokens_come_back_in_another_order, "moe 3 experts top 1 on ffn"
    ),
    Bug(
        "at the bound is over it",
        "required",
        _bounds_are_outside,
        "train norm ; prune random 37% on ffn.down ; require size <= 1 kB",
    ),
    Bug(
        "each token is given its own probability",
        "required",
        _tokens_see_themselves,
        f'prune random 37% on ffn.down ; require perplexity < 1 using "{HELD_OUT}"',
    ),
    Bug(
        "a result that is refused stays changed",
        "required",
        _refused_and_changed,
        "prune random 37% global on ffn.down + attn.o ; require zeros < 1% on ffn.down + attn.o",
    ),
    Bug("the balancing loss is inverted", "experts", _balance_inverted, "moe 4 experts top 2 balance 0.5 on ffn"),
)
