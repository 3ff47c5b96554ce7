"""Fixtures and settings shared by all tests: no network, one thread per worker, real models loaded once."""

from __future__ import annotations

import gc
import importlib
import os
import pkgutil
import sys
import warnings
from typing import TYPE_CHECKING, Any

# Before torch and transformers are imported anywhere.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: one thread each, or they wait for one another.
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_COMMON: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("dev", max_examples=25, **_COMMON)
settings.register_profile("ci", max_examples=100, derandomize=True, print_blob=True, **_COMMON)
settings.register_profile("deep", max_examples=2000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))

# Warnings that other packages give about themselves; ours stay errors.
_EXTERNAL: tuple[str, ...] = ()


def pytest_configure(config: pytest.Config) -> None:
    for line in _EXTERNAL:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Torch takes as many threads as there are cores for each worker; under xdist it gets one."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _same_draws() -> None:
    """Hypothesis draws constants of the modules that are loaded: all, or draws depend on which tests ran before."""
    import surgery

    for module in pkgutil.walk_packages(surgery.__path__, "surgery."):
        importlib.import_module(module.name)


@pytest.fixture(autouse=True)
def _no_module_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A module that a test wrote and loaded is forgotten after it: by other tests, and by Hypothesis."""
    before, written = len(sys.modules), str(tmp_path_factory.getbasetemp())
    yield
    for name, module in list(sys.modules.items())[before:]:
        if str(getattr(module, "__file__", "")).startswith(written):
            del sys.modules[name]


@pytest.fixture(scope="session", autouse=True)
def _few_collections() -> None:
    """An export makes so many objects that the collector would go through all imported modules time and again."""
    for name in ("torch", "transformers"):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture(scope="session")
def minilm_directory() -> Path:
    """The real MiniLM encoder (22.7 M parameters): an ordinary Hugging Face directory."""
    from tests.pretrained import minilm

    return minilm()


@pytest.fixture
def minilm(minilm_directory: Path) -> Any:
    """MiniLM in float32, eval; a fresh one for each test."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(minilm_directory).eval()


@pytest.fixture(scope="session")
def smollm2_directory() -> Path:
    """The real decoder (SmolLM2-135M-Instruct, bfloat16, with its tokenizer), unpacked once into the user's cache."""
    from tests.pretrained import smollm2

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return smollm2()


@pytest.fixture
def smollm2(smollm2_directory: Path) -> Any:
    """SmolLM2 in bfloat16, eval; a fresh one for each test."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2_directory).eval()


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_directory)
