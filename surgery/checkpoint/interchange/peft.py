"""What a program added, as directories that PEFT loads: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import nn

from surgery.checkpoint import tensors as files
from surgery.checkpoint.interchange.peft_front import prefix, prompt
from surgery.checkpoint.interchange.peft_ia3 import ia3
from surgery.checkpoint.interchange.peft_lora import lora
from surgery.checkpoint.interchange.peft_place import Adapter, Place, cannot, place
from surgery.checkpoint.interchange.peft_trained import with_trained
from surgery.checkpoint.staging import staged
from surgery.compiler.plan import Step
from surgery.compiler.record import record_of
from surgery.errors import CheckpointError

Maker = Callable[[nn.Module, Sequence[Place]], Adapter]
BESIDE = ("quantize", "optimize", "freeze")  # statements that an adapter's directory has no need to tell of
NO_FORMAT: Mapping[str, str] = {
    "adapter": "a network on the way into the residual stream is none of PEFT's methods",
    "instruct": "its tokens are fixed: `prompt init text` makes them rows that can be trained and exported",
    "shots": "its tokens are fixed: `prompt init text` makes them rows that can be trained and exported",
}


def export(model: nn.Module, path: str | Path, *, origin: str | None = None, force: bool = False) -> None:
    """Write every adapter of a transformed model: the unnamed one into `path`, each named one into a folder in it.

    path: a new directory, which appears whole or not at all. origin: what to call the base.
    Rows of a fused projection become one adapter of the sum of their ranks, zero elsewhere: the same product. Of a
    prompt or prefix that a network makes, PEFT keeps what the network makes.
    Errors: S421 not transformed, S451 what PEFT's format cannot say, S430 to S433 the directory.
    """
    record = record_of(model)
    if record is None:
        raise CheckpointError.of("S421", "this model was not transformed: it has no adapter to export")
    adapters = _adapters(model, record.plan.steps)
    named = origin or getattr(getattr(model, "config", None), "_name_or_path", None) or None
    with staged(Path(path), force) as partial:
        for name, made in adapters.items():
            folder = partial if name == "default" else partial / name
            folder.mkdir(exist_ok=True)
            config = {
                "base_model_name_or_path": named,
                "task_type": _task(model, made),
                "inference_mode": True,
                **made.config,
            }
            (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
            files.write(folder / "adapter_model.safetensors", dict(made.tensors))


def _adapters(model: nn.Module, steps: Sequence[Step]) -> dict[str, Adapter]:
    """Statements by the name of their adapter, and what is trained beside the only one."""
    found: dict[str, list[Step]] = {}
    trained: list[Step] = []
    for step in steps:
        if step.operation.verb in BESIDE or step.operation.phase == "require":
            continue
        if step.operation.phase == "train":
            trained.append(step)
            continue
        if step.operation.phase != "attach":
            raise cannot(
                f"`{step.statement}` changes the base, and a PEFT adapter is one for a base that stays as it was",
                "merge, or export without that statement",
            )
        found.setdefault(step.statement.name or "default", []).append(step)
    if not found:
        raise cannot("the program adds no adapter that PEFT has a format for", "`--to huggingface` writes whole models")
    made = {name: _adapter(model, here) for name, here in found.items()}
    if not trained:
        return made
    if len(made) > 1:
        raise cannot(
            f"`{trained[0].statement}` trains the base of {len(made)} adapters, and PEFT keeps what it trains in one",
            "export them one by one",
        )
    return {name: with_trained(model, each, trained) for name, each in made.items()}


def _adapter(model: nn.Module, steps: Sequence[Step]) -> Adapter:
    """The statements of one name as one PEFT adapter."""
    made = {step.operation.verb: (step, _maker(step)) for step in steps}
    if len({maker for _, maker in made.values()}) > 1:
        first, second = (step.statement for step, _ in list(made.values())[:2])
        raise cannot(f"`{first}` and `{second}` are one adapter, which PEFT cannot have", "give one of them a name")
    (_, maker), *_ = made.values()
    places = [place(model, step, part) for step in steps for part in step.parts if _holds(part.kind, maker)]
    return maker(model, places)


def _maker(step: Step) -> Maker:
    verb = step.operation.verb
    if verb == "ptuning":
        return prompt if getattr(step.operation, "version", None) == "v1" else prefix
    makers: Mapping[str, Maker] = {"lora": lora, "ia3": ia3, "prefix": prefix, "prompt": prompt}
    if verb not in makers:
        why = f": {NO_FORMAT[verb]}" if verb in NO_FORMAT else ""
        raise cannot(f"PEFT has no format for `{step.statement}`{why}", "merge it, or leave it out of the program")
    return makers[verb]


def _holds(kind: str, maker: Maker) -> bool:
    """Whether a statement's tensors are at such parts: a prompt's are at its entry, not at the calls that read it."""
    return maker is not prompt or kind == "entry"


def _task(model: nn.Module, made: Adapter) -> str | None:
    """What PEFT wraps the model as; something, where it is to put rows in front."""
    tasks = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}
    other = None if made.wrapped else "FEATURE_EXTRACTION"
    return next((task for end, task in tasks.items() if type(model).__name__.endswith(end)), other)
