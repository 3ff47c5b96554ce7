"""Read what `save` wrote: an empty model, rewritten as the plan says, then filled with the saved bits."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.checkpoint import huggingface
from surgery.checkpoint import tensors as files
from surgery.checkpoint.base import FOUND, find, headers, same_names
from surgery.checkpoint.header import Header
from surgery.checkpoint.inventory import Held, inventory, put
from surgery.checkpoint.manifest import NAME, Manifest
from surgery.checkpoint.models import LoadedModel
from surgery.checkpoint.models import load as load_base
from surgery.checkpoint.models import load_meta as load_base_meta
from surgery.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from surgery.compiler import Plan


def load(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    base: str | Path | None = None,
    tell: files.Tell = files.silent,
) -> nn.Module:
    """The model that `surgery.save` wrote to a directory: on the CPU, in eval mode, ready to train on.

    model: the untransformed base, rewritten and filled in place; needed where the directory does not say how to build
        it (a plain torch module that came from no MODEL). Where it refers to a base that is not there, this is it.
    base: the directory of the base that it refers to, where that lies elsewhere by now.
    tell: called with the number of bytes read since its last call.
    Errors: S410 to S413 the tensor files, S440 to S446 the manifest or what it says, S447 and S448 the base.
    """
    return read(Path(path), model, base=base, tell=tell).model


def read(
    directory: Path,
    model: nn.Module | None = None,
    *,
    base: str | Path | None = None,
    tell: files.Tell = files.silent,
) -> LoadedModel:
    """As `load`, with the example inputs and the origin of the base."""
    from surgery.training.masks import close

    if not directory.is_dir():
        raise CheckpointError.of("S401", f"no directory `{directory}`")
    manifest = Manifest.read(directory)
    try:
        place = find(directory, manifest, base)
    except CheckpointError:
        if base is not None or model is None:
            raise
        place = None
    held = headers(directory, manifest, place)
    if model is None:
        loaded = skeleton(directory, manifest)
    elif "_surgery" in model.__dict__:
        raise CheckpointError.of("S446", "`model=` is transformed already; give the untransformed base")
    else:
        loaded = LoadedModel(model, manifest.origin or "", directory=directory)
    plan = replay(loaded.model, manifest, shaped=model is None and manifest.shape == "config")
    _fill(inventory(loaded.model), manifest, held, tell)
    if place is not None:
        loaded.model.__dict__[FOUND] = place
    close(loaded.model)
    remember(loaded.model, plan, manifest.untrained)
    _switch_off(loaded.model, manifest.inactive)
    loaded.model.eval()
    return loaded


def load_either(spec: str, meta: bool = False, base: str | Path | None = None) -> LoadedModel:
    """The model that a MODEL means, or what `surgery.save` wrote to a directory. meta: shapes only. base: of `load`."""
    directory = Path(spec).expanduser()
    if not (directory / NAME).exists():
        return load_base_meta(spec) if meta else load_base(spec)
    if not meta:
        return read(directory, base=base)
    manifest = Manifest.read(directory)
    loaded = skeleton(directory, manifest, meta=True)
    remember(loaded.model, replay(loaded.model, manifest, shaped=manifest.shape == "config"))
    return loaded


def skeleton(directory: Path, manifest: Manifest, meta: bool = False) -> LoadedModel:
    """The base without weights: transformers' own classes from config.json, others from their MODEL."""
    module, _, name = manifest.model_class.partition(":")
    if module.split(".")[0] == "transformers":
        try:
            cls = huggingface.find_class(name) or getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            raise CheckpointError.of("S443", f"this transformers has no class {name} in {module}") from None
        settings = huggingface.config(directory, quantized=True)
        model = huggingface.skeleton_of(
            cls,
            settings,
            huggingface.dtype_of(settings.dtype),
            meta=meta,
            where=directory,
            options=manifest.settings,
        )
        huggingface.remember_generation(model, directory)
        return LoadedModel(model, manifest.origin or "", directory=directory)
    if manifest.origin is None or ":" not in manifest.origin:
        raise CheckpointError.of(
            "S444",
            f"`{directory}` does not say how to build {manifest.model_class}",
            help="surgery.load(path, model=...) with the untransformed base",
        )
    return load_base_meta(manifest.origin) if meta else load_base(manifest.origin)


def replay(model: nn.Module, manifest: Manifest, shaped: bool) -> Plan:
    """Rewrite the structure as the plan says: no seeds drawn, no data computed. shaped: see `Manifest.shape`."""
    from surgery.compiler import Plan, perform

    try:
        plan = Plan.from_json(manifest.plan)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError.of("S440", f"the manifest's plan cannot be read ({error})") from None
    perform(plan, model, hollow=True, shaped=shaped)
    return plan


def _switch_off(model: nn.Module, inactive: tuple[str, ...]) -> None:
    """The adapters that were off when the model was saved."""
    from surgery.compiler.switch import names, set_off

    if inactive:
        unknown = set(inactive) - names(model)
        if unknown:
            raise CheckpointError.of(
                "S440", f"the manifest switches off `{min(unknown)}`, which the model does not have"
            )
        set_off(model, set(inactive))


def remember(model: nn.Module, plan: Plan, untrained: tuple[str, ...] = ()) -> None:
    """Record the plan with the tensors as they are now, so that later writes to the base are noticed."""
    from surgery.compiler.record import ATTRIBUTE, remembered

    model.__dict__[ATTRIBUTE] = remembered(plan, model, untrained)


def _fill(held: dict[str, Held], manifest: Manifest, found: list[tuple[str, Header]], tell: files.Tell) -> None:
    same_names(set(held), set(manifest.tensors), "the directory")
    ties = {name: one.name for one in held.values() for name in one.names[1:]}
    if ties != dict(manifest.ties):
        raise CheckpointError.of("S445", "the model ties other tensors than the saved one did")
    names = {(entry.file, entry.key or name): name for name, entry in manifest.tensors.items()}
    for file, header in found:
        for key, tensor in files.read(header, tell):
            if key in manifest.extras:
                continue
            name = names.pop((file, key))
            put(held[name], _checked(name, tensor, manifest, held[name]))
    for name in names.values():  # of a base that was given
        slot = files.slot_of(name, held[name].tensor)
        manifest.check_form(name, slot.dtype, slot.shape)
        _checked(name, held[name].tensor, manifest, held[name])
    trainable = set(manifest.trainable)
    for name, one in held.items():
        if one.parameter and one.tensor.is_floating_point():
            one.tensor.requires_grad_(name in trainable)


def _checked(name: str, tensor: Tensor, manifest: Manifest, held: Held) -> Tensor:
    """The tensor, its digest and shape being what they should be."""
    manifest.check(name, tensor)
    if tensor.shape != held.tensor.shape:
        raise CheckpointError.of(
            "S442", f"{name} has shape {tuple(tensor.shape)}; this model's is {tuple(held.tensor.shape)}"
        )
    return tensor
