"""What a program added, as directories that PEFT loads: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.anatomy.parts import Part
from surgery.checkpoint import tensors as files
from surgery.checkpoint.staging import staged
from surgery.compiler.plan import Step
from surgery.compiler.record import record_of
from surgery.errors import CheckpointError
from surgery.graph.draft import Draft
from surgery.graph.module import Rewritten
from surgery.graph.site import tensor_name

ROOT = "base_model.model."
BESIDE = ("quantize", "optimize", "freeze")  # statements that an adapter's directory has no need to tell of


@dataclass(frozen=True)
class Adapter:
    """One PEFT adapter: what its configuration says, and its tensors by PEFT's names."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Place:
    """One part that a statement acts on, with the tensors it added there."""

    step: Step
    part: Part
    module: Rewritten

    def tensor(self, name: str) -> Tensor:
        """A tensor that the statement added, by the name it was added under."""
        return self.module.get_parameter(tensor_name(name, self.part, self.step.statement.name)).detach()

    @property
    def rows(self) -> Tensor:
        """The part's output channels."""
        runs = self.part.channels or ((0, self.part.shape[0]),)
        return torch.cat([torch.arange(start, stop) for start, stop in runs])

    @property
    def operation(self) -> Any:
        return self.step.operation.at(self.part)


def export(model: nn.Module, path: str | Path, *, origin: str | None = None, force: bool = False) -> None:
    """Write every adapter of a transformed model: the unnamed one into `path`, each named one into a folder in it.

    path: a new directory, which appears whole or not at all. origin: what to call the base.
    Rows of a fused projection become one adapter of the sum of their ranks, zero elsewhere: the same product.
    Errors: S421 not transformed, S451 what PEFT's format cannot say, S430 to S433 the directory.
    """
    record = record_of(model)
    if record is None:
        raise CheckpointError.of("S421", "this model was not transformed: it has no adapter to export")
    adapters = {name: adapter(model, steps) for name, steps in _by_name(record.plan.steps).items()}
    if not adapters:
        raise CheckpointError.of("S451", "the program adds no adapter that PEFT has a format for")
    named = origin or getattr(getattr(model, "config", None), "_name_or_path", None) or None
    with staged(Path(path), force) as partial:
        for name, made in adapters.items():
            folder = partial if name == "default" else partial / name
            folder.mkdir(exist_ok=True)
            config = {
                "base_model_name_or_path": named,
                "task_type": _task(model),
                "inference_mode": True,
                **made.config,
            }
            (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
            files.write(folder / "adapter_model.safetensors", dict(made.tensors))


def adapter(model: nn.Module, steps: Sequence[Step]) -> Adapter:
    """The statements of one name as one PEFT adapter. Errors: S451."""
    kinds = {step.operation.verb for step in steps}
    if len(kinds) > 1:
        first, second = (next(step for step in steps if step.operation.verb == kind) for kind in sorted(kinds)[:2])
        raise _cannot(
            f"`{first.statement}` and `{second.statement}` are one adapter, which PEFT cannot have", "name one"
        )
    makers = {"lora": lora, "ia3": ia3, "prefix": prefix}
    verb = kinds.pop()
    if verb not in makers:
        raise _cannot(f"PEFT has no format for `{steps[0].statement}`", "merge it, or leave it out of the program")
    places = [Place(step, part, _module(model, step, part)) for step in steps for part in step.parts]
    return makers[verb](model, places)


def lora(model: nn.Module, places: Sequence[Place]) -> Adapter:
    """Low-rank adapters; PEFT's scale is alpha / r, whatever ours was called."""
    by_path: dict[str, list[Place]] = {}
    for place in places:
        if place.part.kind not in ("projection", "lookup"):
            raise _cannot(f"`{place.step.statement}` acts on {place.part.role} at {place.part.path}", "merge it")
        by_path.setdefault(place.part.path, []).append(place)
    dropouts = {place.operation.dropout for place in places}
    doras = {place.operation.dora for place in places}
    if len(dropouts) > 1 or len(doras) > 1:
        raise _cannot("one adapter has one dropout and is DoRA or not, everywhere", "give the statements names")
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    tensors: dict[str, Tensor] = {}
    for path, here in by_path.items():
        a, b, scale = _joined(here)
        ranks[path], alphas[path] = a.shape[0], scale * a.shape[0]
        lookup = here[0].part.kind == "lookup"
        names = ("lora_embedding_A", "lora_embedding_B") if lookup else ("lora_A.weight", "lora_B.weight")
        tensors.update({f"{ROOT}{path}.{name}": tensor for name, tensor in zip(names, (a, b), strict=True)})
        if doras == {True}:
            tensors[f"{ROOT}{path}.lora_magnitude_vector"] = _magnitude(here)
    (rank, _), (alpha, _) = (Counter(each.values()).most_common(1)[0] for each in (ranks, alphas))
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {path: each for path, each in ranks.items() if each != rank},
        "alpha_pattern": {path: each for path, each in alphas.items() if each != alpha},
        "target_modules": _targets(model, by_path),
        "lora_dropout": dropouts.pop(),
        "use_dora": doras.pop(),
        "use_rslora": False,
        "fan_in_fan_out": any(place.part.transposed for place in places),
        "bias": "none",
    }
    return Adapter(config, tensors)


def _joined(places: Sequence[Place]) -> tuple[Tensor, Tensor, float]:
    """A, B and scale of all parts of one projection: A's one upon the other, B's in a row of blocks."""
    scale = places[0].operation.factor
    pairs = [(place.tensor("lora_A"), place.tensor("lora_B")) for place in places]
    if len(places) == 1 and places[0].part.channels is None:
        return pairs[0][0].contiguous(), pairs[0][1].contiguous(), scale
    a = torch.cat([first for first, _ in pairs])
    b = torch.zeros(places[0].part.shape[0], a.shape[0], dtype=a.dtype)
    start = 0
    for place, (first, second) in zip(places, pairs, strict=True):
        b[place.rows, start : start + first.shape[0]] = second * (place.operation.factor / scale)
        start += first.shape[0]
    return a, b, scale


def _magnitude(places: Sequence[Place]) -> Tensor:
    """Norms of all rows: the trained ones, and of rows that no statement acts on the base's own."""
    module, part = places[0].module, places[0].part
    draft = Draft(module, part.path, part.parameter)
    first = places[0].tensor("lora_magnitude")
    magnitude: Tensor = torch.linalg.vector_norm(draft.evaluate(draft.captured.weight).to(first.dtype), dim=1)
    for place in places:
        magnitude[place.rows] = place.tensor("lora_magnitude")
    return magnitude


def ia3(model: nn.Module, places: Sequence[Place]) -> Adapter:
    """Learned scales; rows that no statement acts on are multiplied by one."""
    tensors: dict[str, Tensor] = {}
    inner: dict[str, list[Place]] = {}
    targets: dict[str, list[Place]] = {}
    for place in places:
        path, key = place.part.path, f"{ROOT}{place.part.path}.ia3_l"
        targets.setdefault(path, []).append(place)
        if place.part.role == "ffn.down":
            inner.setdefault(path, []).append(place)
            tensors[key] = place.tensor("ia3_input").view(1, -1)
            continue
        scale = place.tensor("ia3_output")
        tensors.setdefault(key, torch.ones(place.part.shape[0], 1, dtype=scale.dtype))[place.rows, 0] = scale
    if any(0 < len(inner.get(path, ())) < len(here) for path, here in targets.items()):
        raise _cannot("one projection has its input and its output scaled", "merge one of them")
    config = {
        "peft_type": "IA3",
        "target_modules": _targets(model, targets),
        "feedforward_modules": _targets(model, inner) if inner else [],
        "fan_in_fan_out": any(place.part.transposed for place in places),
    }
    return Adapter(config, tensors)


def prefix(model: nn.Module, places: Sequence[Place]) -> Adapter:
    """Keys and values in front of every layer's: (n, layers * 2 * heads * width), keys before values."""
    statement = places[0].step.statement
    operation = places[0].operation
    heads = places[0].part.heads
    record = record_of(model)
    depth = max((stack.depth for stack in record.plan.anatomy.stacks), default=0) if record is not None else 0
    layers = [place.part.layer for place in places]
    if operation.gated or operation.via is not None:
        raise _cannot(f"PEFT has no format for `{statement}`", "`via mlp` becomes plain keys and values by a merge")
    if layers != list(range(depth)) or heads is None or any(place.part.heads != heads for place in places):
        raise _cannot(f"`{statement}` does not act on every layer alike, as PEFT's prefixes do", "select all layers")
    if heads.key_width != heads.value_width:
        raise _cannot("keys and values differ in width", "PEFT keeps both in one tensor")
    both = [torch.stack([place.tensor("prefix_key"), place.tensor("prefix_value")]) for place in places]
    table = torch.stack(both).permute(3, 0, 1, 2, 4).flatten(1).contiguous()
    config = {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": table.shape[0],
        "num_layers": depth,
        "num_attention_heads": heads.key_value,
        "token_dim": heads.key_value * heads.key_width,
        "num_transformer_submodules": 1,
        "encoder_hidden_size": heads.key_value * heads.key_width,
        "prefix_projection": False,
    }
    return Adapter(config, {"prompt_embeddings": table})


def _by_name(steps: Sequence[Step]) -> dict[str, list[Step]]:
    """Statements by the name of their adapter. Errors: S451 for what changes the base that the adapter is for."""
    found: dict[str, list[Step]] = {}
    for step in steps:
        if step.operation.verb in BESIDE:
            continue
        if step.operation.phase != "attach":
            raise _cannot(
                f"`{step.statement}` changes the base, and a PEFT adapter is one for a base that stays as it was",
                "merge, or export without that statement",
            )
        found.setdefault(step.statement.name or "default", []).append(step)
    return found


def _module(model: nn.Module, step: Step, part: Part) -> Rewritten:
    module = model.get_submodule(part.path)
    for child in (module, *module.children()):
        if isinstance(child, Rewritten) and (child.facts is None) == (part.kind == "attention"):
            return child
    raise _cannot(f"`{step.statement}` has nothing of its own at {part.path}", "it may have been merged")


def _targets(model: nn.Module, paths: Mapping[str, object]) -> list[str] | str:
    """Full paths; as one pattern where PEFT would take other modules that end in one of them as well."""
    ends = tuple(f".{path}" for path in paths)
    if any(name.endswith(ends) for name, _ in model.named_modules() if name not in paths):
        return "|".join(map(re.escape, paths))
    return sorted(paths)


def _task(model: nn.Module) -> str | None:
    tasks = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}
    return next((task for end, task in tasks.items() if type(model).__name__.endswith(end)), None)


def _cannot(what: str, help: str = "") -> CheckpointError:
    return CheckpointError.of("S451", what, help=help)
