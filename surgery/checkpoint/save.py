"""Write a transformed model to a directory: base tensors under base names, what the program added beside them."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.checkpoint import huggingface
from surgery.checkpoint import tensors as files
from surgery.checkpoint.base import base_directory, referred, weights_directory
from surgery.checkpoint.content import Content, content, plain
from surgery.checkpoint.huggingface import TOKENIZER_FILES
from surgery.checkpoint.inventory import Held, inventory
from surgery.checkpoint.layout import write_index
from surgery.checkpoint.manifest import NAME, Base, Manifest
from surgery.checkpoint.sink import Sink, fill
from surgery.checkpoint.staging import check_target, staged
from surgery.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from surgery.compiler import Plan


def save(
    model: nn.Module,
    path: str | Path,
    *,
    force: bool = False,
    origin: str | None = None,
    tokenizer: Any | None = None,
    standalone: bool = False,
    tell: files.Tell = files.silent,
) -> None:
    """Write a model that `surgery.apply` transformed; `surgery.load(path)` gives the same bits.

    path: a new directory, which appears whole or not at all. force: replace a model that lies there.
    standalone: copy the base. Otherwise, where the model still has the very bits of the directory that it was read
        from, that is referred to, by path and by the digest of every tensor.
    origin: MODEL that the base came from, where the model does not tell (`FILE.py:FUNCTION` of a plain module).
    tokenizer: saved too; by default the files of the base's directory are copied.
    tell: called with the number of bytes written since its last call.
    Errors: S420 dtypes safetensors lacks, S421 not transformed, S430 to S433 the directory.
    """
    from surgery.compiler.unmerge import KEPT

    record = model.__dict__.get("_surgery")
    if record is None:
        raise CheckpointError.of(
            "S421",
            "this model was not transformed, or has been merged: there is nothing of ours to save",
            help="save it as its library does, `model.save_pretrained(path)`"
            + ("; or take the merge out again first, `surgery.unmerge(model)`" if KEPT in model.__dict__ else ""),
        )
    from surgery.compiler.record import untrained
    from surgery.compiler.switch import refuse_routed

    refuse_routed(model)
    for name, one in inventory(model).items():
        if one.tensor.is_meta:
            raise CheckpointError.of("S422", f"{name} is on the meta device: there are no weights to save")
    check_target(Path(path), force)
    base, elsewhere = (None if standalone else referred(model, record.plan, origin, Path(path))) or (None, {})
    found = content(model, weights_directory(model, origin), elsewhere)
    with staged(Path(path), force) as partial:
        values = found.constants()
        for name, one in found.held.items():
            if name not in elsewhere:
                values |= found.values(name, one.tensor)
        with Sink(partial, found.files, tell=tell) as sink:
            sink.write(values)
            for name in elsewhere:
                sink.note(name, found.held[name].tensor)
            sink.finish()
        write_index(partial, found.weights)
        write_config(model, partial, found)
        write_tokenizer(model, partial, origin, tokenizer)
        write_manifest(model, partial, found, sink.digests, origin, untrained(record, model), base)


def write_manifest(
    model: nn.Module,
    directory: Path,
    found: Content,
    digests: Mapping[str, str],
    origin: str | None,
    untrained: Collection[str],
    base: Base | None = None,
) -> None:
    """surgery.json of a transformed model, or of one that is hollow, whose tensors were written."""
    from surgery import __version__
    from surgery.compiler.switch import active, names, resting

    record, rested = model.__dict__["_surgery"], resting(model)
    plan = record.plan
    Manifest(
        version=__version__,
        program=str(plan.program),
        seed=plan.program.seed,
        plan=_standing(plan, model).to_json(),
        model_class=f"{type(model).__module__}:{type(model).__qualname__}",
        origin=origin or _origin(model),
        tensors=found.entries(digests),
        ties={name: one.name for one in found.held.values() for name in one.names[1:]},
        trainable=tuple(
            one.name
            for one in found.held.values()
            if one.parameter and (one.tensor.requires_grad or one.name in rested)
        ),
        untrained=tuple(untrained),
        inactive=tuple(sorted(names(model) - set(active(model)))),
        extras=found.packed.extras,
        shape=record.shape,
        settings=_settings(model),
        base=base,
    ).write(directory / NAME)


def save_merged(
    model: nn.Module,
    path: Path,
    *,
    source: Path | None,
    origin: str | None = None,
    force: bool = False,
    tell: files.Tell = files.silent,
) -> None:
    """Write a merged model: as its library writes it where nothing of ours is left, as `save` does otherwise.

    source: the directory whose tokenizer files are copied, if any. A plain torch module becomes model.safetensors.
    """
    if "_surgery" in model.__dict__:
        save(model, path, force=force, origin=origin, standalone=True, tell=tell)
        return
    with staged(path, force) as partial:
        if hasattr(model, "save_pretrained") and huggingface.converts(model):
            with huggingface.quiet():
                model.save_pretrained(partial)  # type: ignore[operator]
        else:
            found = plain(model, weights_directory(model, origin))
            fill(partial, found.files, {name: one.tensor for name, one in found.held.items()}, tell)
            write_index(partial, found.weights)
            write_config(model, partial, found)
        if source is not None and hasattr(model, "config"):
            copy_tokenizer(source, partial)


def _standing(plan: Plan, model: nn.Module) -> Plan:
    """The plan without the places that a merge made plain again."""
    from surgery.graph import attention_interface, edge, soft, stack
    from surgery.graph.module import rewritten

    children = (attention_interface.CHILD, edge.CHILD, soft.CHILD, stack.CHILD)
    split = [(path, *path.rpartition(".")) for path, _ in rewritten(model)]
    places = {above if last in children else path for path, above, _, last in split}
    steps = (
        replace(
            step,
            parts=tuple(part for part in step.parts if part.path in places or not step.operation.rewrites(part)),
        )
        for step in plan.steps
    )
    return replace(plan, steps=tuple(steps))


def bytes_of(model: nn.Module) -> int:
    """How many bytes `save` will write, near enough for a progress bar."""
    return sum(one.tensor.numel() * one.tensor.dtype.itemsize for one in inventory(model).values())


def _dtype(held: Mapping[str, Held]) -> torch.dtype | None:
    """Of the base: its first floating parameter."""
    ours = (one.tensor.dtype for one in held.values() if one.parameter and not one.added)
    return next((dtype for dtype in ours if dtype.is_floating_point), None)


def write_config(model: nn.Module, directory: Path, found: Content) -> None:
    """config.json as `from_pretrained` reads it; as it was before the model was reshaped, where that is replayed."""
    if not hasattr(getattr(model, "config", None), "to_json_file"):
        return
    record: Any = model.__dict__.get("_surgery")
    replayed = record is not None and record.shape == "replay"
    config: Any = copy.deepcopy(record.config if replayed else model.config)
    config.architectures = [type(model).__name__]
    config.dtype = _dtype(found.held)
    if found.packed.config is not None:
        config.quantization_config = dict(found.packed.config)
    config.to_json_file(directory / "config.json", use_diff=True)
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(directory)


def write_tokenizer(model: nn.Module, directory: Path, origin: str | None, tokenizer: Any | None) -> None:
    """The tokenizer given, or the files beside the base."""
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
        return
    source = base_directory(model, origin)
    if source is not None:
        copy_tokenizer(source, directory)


def copy_tokenizer(source: Path, directory: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file() and not (directory / name).exists():
            shutil.copyfile(source / name, directory / name)


def _origin(model: nn.Module) -> str | None:
    name: Any = getattr(model, "name_or_path", None)
    return str(name) if name else None


def _settings(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    said: dict[str, Any] = {"attn_implementation": getattr(config, "_attn_implementation", None)}
    if getattr(model, "_can_set_experts_implementation", lambda: False)():
        said["experts_implementation"] = getattr(config, "_experts_implementation", None)
    return {name: implementation for name, implementation in said.items() if isinstance(implementation, str)}
