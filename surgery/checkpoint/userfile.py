"""Call the user's function that makes a model, and report its failures by its own line rather than by ours."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from surgery.checkpoint.weightless import weightless
from surgery.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn


def build(spec: str, meta: bool) -> tuple[nn.Module, tuple[Any, ...] | Mapping[str, Any] | None, str]:
    """The module, its example inputs (None when not given) and the spec with an absolute path.

    spec: `FILE.py:FUNCTION` or `module:function`.
    meta: call it so that parameters have no memory; where its code cannot, call it as it is.
    Errors: S401 no such file, module or function; S409 it raises or returns something else.
    """
    import torch

    place, _, name = spec.rpartition(":")
    path = Path(place).expanduser()
    from_file = place.endswith(".py")
    if from_file and not path.is_file():
        raise CheckpointError.of("S401", f"no file `{place}`")
    search = path.parent.resolve() if from_file else Path.cwd()
    with _importable(search):
        with _reported(spec):
            module = _run_file(path.resolve()) if from_file else importlib.import_module(place)
        function = getattr(module, name, None)
        if not callable(function):
            raise CheckpointError.of("S401", f"`{place}` has no function `{name}`", help=_functions(module))
        with _reported(spec):
            result = _call_weightless(function) if meta else function()
    model, inputs = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(model, torch.nn.Module):
        raise CheckpointError.of(
            "S409",
            f"`{spec}` returned {type(result).__name__}",
            help="return a torch.nn.Module, or a pair of a module and its example inputs",
        )
    if inputs is not None and not isinstance(inputs, Mapping):
        inputs = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    return model.eval(), inputs, f"{path.resolve()}:{name}" if from_file else spec


def _call_weightless(function: Callable[[], Any]) -> Any:
    try:
        with weightless():
            return function()
    except Exception:  # code that computes with its weights or reads a file cannot run without data
        return function()


def _run_file(path: Path) -> ModuleType:
    name = f"surgery_model_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise ImportError(f"{path} is not Python")
    module = importlib.util.module_from_spec(found)
    # Pickling, dataclasses and `inspect` look a class's module up here.
    sys.modules[name] = module
    found.loader.exec_module(module)
    return module


@contextmanager
def _importable(directory: Path) -> Iterator[None]:
    """Modules beside the user's file can be imported, as when it is run as a script."""
    sys.path.insert(0, str(directory))
    try:
        yield
    finally:
        if str(directory) in sys.path:
            sys.path.remove(str(directory))


@contextmanager
def _reported(spec: str) -> Iterator[None]:
    """An exception in the user's code as one message that names the line."""
    try:
        yield
    except CheckpointError:
        raise
    except SyntaxError as error:
        raise CheckpointError.of("S409", f"{error.filename}:{error.lineno}: {error.msg}") from error
    except ModuleNotFoundError as error:
        if error.name and spec.startswith(error.name):
            raise CheckpointError.of("S401", f"no module `{error.name}`") from error
        raise _blame(spec, error) from error
    except (Exception, SystemExit) as error:
        raise _blame(spec, error) from error


def _blame(spec: str, error: BaseException) -> CheckpointError:
    here = str(Path(__file__))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != here]
    frames = [frame for frame in frames if not frame.filename.startswith("<frozen")]
    own = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    where = f"{own[-1].filename}:{own[-1].lineno}: in {own[-1].name}: " if own else ""
    text = str(error).strip().splitlines()
    what = f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
    return CheckpointError.of("S409", f"{where}{what}", help=f"the error is in the code of MODEL `{spec}`")


def _functions(module: ModuleType) -> str:
    own = [
        name
        for name, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
    ]
    return f"it has {', '.join(own)}" if own else ""
