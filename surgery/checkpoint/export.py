"""A transformed model in a form that others load, or that needs nothing else to be loaded."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from surgery.checkpoint.forms import FORMS
from surgery.checkpoint.staging import check_target
from surgery.errors import CheckpointError


def export(
    model: nn.Module | str | Path,
    path: str | Path,
    *,
    to: str,
    base: str | Path | None = None,
    origin: str | None = None,
    source: Path | None = None,
    force: bool = False,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
) -> None:
    """Write what others load to a new directory, which appears whole or not at all. The model stays as it is.

    model: or the directory that `save` or `surgery apply` wrote; what `base`, `origin`, `source` and `example_inputs`
        leave out is as that says.
    to: `peft`, the adapters alone, one directory for each; `huggingface`, a copy of the model with everything folded,
        which `from_pretrained` loads; `mixtral`, a llama with experts in every layer as a Mixtral; `pt2`, the model as
        it runs now, as a program of torch.export that runs without us; `standalone`, what `load` reads, with a copy of
        the base: of a model as `save(model, path, standalone=True)`, of a directory tensor by tensor, without loading.
    base: of a directory, where its base lies by now, as of `load`. origin: what to call the base. source: where
    tokenizer files are copied from. example_inputs: of a plain module, for `pt2`.
    Errors: S421 not transformed, S451 what the form cannot say, S453 an unknown form, S456 and S457 what no program of
    torch alone computes, S430 to S435 the directory; of a directory, those of `load`.
    """
    if to not in FORMS:
        raise CheckpointError.of("S453", f"no form `{to}`", help=f"there are {' and '.join(FORMS)}")
    if isinstance(model, str | Path):
        directory = Path(model)
        if to == "standalone":
            from surgery.checkpoint.standalone import stream_standalone

            stream_standalone(directory, Path(path), force=force, base=base)
            return
        from surgery.checkpoint.load import read

        check_target(Path(path), force)
        loaded = read(directory, base=base)
        model, origin, source = loaded.model, origin or loaded.origin or None, source or directory
        example_inputs = loaded.example_inputs if example_inputs is None else example_inputs
    if to == "standalone":
        from surgery.checkpoint.save import save

        save(model, path, force=force, origin=origin, standalone=True)
    elif to == "mixtral":
        from surgery.checkpoint.interchange import mixtral

        mixtral.export(model, Path(path), source=source, force=force)
    elif to == "pt2":
        from surgery.checkpoint.interchange import pt2

        pt2.export(model, Path(path), example_inputs=example_inputs, source=source, force=force)
    elif to == "peft":
        from surgery.checkpoint.interchange import peft

        peft.export(model, path, origin=origin, force=force)
    else:
        _huggingface(model, Path(path), origin, source, force)


def _huggingface(model: nn.Module, path: Path, origin: str | None, source: Path | None, force: bool) -> None:
    from surgery.checkpoint.save import save_merged
    from surgery.compiler import merge, record_of

    if record_of(model) is None:
        raise CheckpointError.of("S421", "this model was not transformed: save it as its library does")
    merged = merge(copy.deepcopy(model))
    kept = record_of(merged)
    if kept is not None:
        left = kept.plan.steps[0].statement
        raise CheckpointError.of("S451", f"no plain weight holds `{left}`", help="`surgery merge` keeps it beside them")
    save_merged(merged, path, source=source, origin=origin, force=force)
