"""A transformed model in a form that others load."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from surgery.checkpoint.forms import FORMS
from surgery.errors import CheckpointError


def export(
    model: nn.Module,
    path: str | Path,
    *,
    to: str,
    origin: str | None = None,
    source: Path | None = None,
    force: bool = False,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
) -> None:
    """Write what others load to a new directory, which appears whole or not at all. The model stays as it is.

    to: `peft`, the adapters alone, one directory for each; `huggingface`, a copy of the model with everything folded,
    which `from_pretrained` loads; `mixtral`, a llama with experts in every layer as a Mixtral; `pt2`, the model as it
    runs now, as a program of torch.export that runs without us. origin: what to call the base. source: where tokenizer
    files are copied from. example_inputs: of a plain module, for `pt2`.
    Errors: S421 not transformed, S451 what the form cannot say, S453 an unknown form, S456 and S457 what no program of
    torch alone computes, S430 to S433 the directory.
    """
    if to not in FORMS:
        raise CheckpointError.of("S453", f"no form `{to}`", help=f"there are {' and '.join(FORMS)}")
    if to == "mixtral":
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
