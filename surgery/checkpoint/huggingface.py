"""Models and tokenizers of Hugging Face directories, local files and safetensors only, without chatter."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.checkpoint.header import PICKLES, Header, check_checkpoint
from surgery.checkpoint.weightless import weightless
from surgery.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = [
    "PICKLES", "TOKENIZER_FILES", "config", "converts", "dtype_of", "find_class", "load", "quiet",
    "remember_generation", "skeleton", "skeleton_of", "tokenizer",
]  # fmt: skip

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "source.spm",
    "target.spm", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def load(directory: Path) -> nn.Module:
    """The model with its weights, headers checked first; eval mode. Errors: S403 to S409, S410 to S414."""
    cls, settings = _class_and_config(directory)
    check_checkpoint(directory)
    with quiet(), _told(directory):
        model, told = cls.from_pretrained(
            directory,
            config=settings,
            local_files_only=True,
            use_safetensors=True,
            dtype="auto",
            trust_remote_code=False,
            output_loading_info=True,
        )
    if told["missing_keys"]:
        # from_pretrained fills these with random numbers and goes on.
        some = sorted(told["missing_keys"])
        raise CheckpointError.of(
            "S416",
            f"the weights in `{directory}` lack {len(some)} tensors of {cls.__name__}: {', '.join(some[:3])}"
            + (", ..." if len(some) > 3 else ""),
            help="`architectures` in config.json must name the class that was saved",
        )
    return model.eval()  # type: ignore[no-any-return]


def skeleton(directory: Path, *, meta: bool) -> nn.Module:
    """The model of config.json with ties and buffers, weights not initialised; eval mode.

    meta: parameters on the meta device; otherwise they are unwritten memory. Buffers hold their values either way.
    """
    cls, settings = _class_and_config(directory)
    model = skeleton_of(cls, settings, _dtype(directory, settings), meta=meta, where=directory)
    remember_generation(model, directory)
    return model


def skeleton_of(
    cls: Any, settings: Any, dtype: torch.dtype, *, meta: bool, where: Path, options: Mapping[str, Any] | None = None
) -> nn.Module:
    """As `skeleton`, from a class and its config object; options: `attn_implementation` and the like."""
    import torch
    from transformers.initialization import no_init_weights

    with quiet(), _told(where), torch.device("cpu"), weightless() if meta else nullcontext(), no_init_weights():
        model = cls._from_config(settings, dtype=dtype, **(options or {}))
        model.tie_weights()
    model.name_or_path = str(where)
    return model.eval()  # type: ignore[no-any-return]


def remember_generation(model: nn.Module, directory: Path) -> None:
    """How to generate, as the directory says it, where it does."""
    if (directory / "generation_config.json").is_file() and getattr(model, "generation_config", None) is not None:
        from transformers import GenerationConfig

        with quiet(), _told(directory):
            model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)


def tokenizer(directory: Path) -> Any | None:
    """The tokenizer in a directory, or None where there are no tokenizer files. Error: S407 when it cannot be read."""
    _require_transformers()
    from transformers import AutoTokenizer

    if not any((directory / name).exists() for name in TOKENIZER_FILES if name != "generation_config.json"):
        return None
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        why = _first_line(error)
        raise CheckpointError.of("S407", f"the tokenizer in `{directory}` cannot be read: {why}") from None


def config(directory: Path, *, quantized: bool = False) -> Any:
    """The config object of a directory. quantized: one that says so is welcome, and what it says is left out.

    Errors: S403 none or not JSON, S405 a type this transformers does not know, S406 quantized and not welcome.
    """
    path = directory / "config.json"
    try:
        data = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError.of(
            "S403",
            f"`{path}` cannot be read: {error.strerror or error}",
            help="MODEL is a directory with config.json and safetensors files",
        ) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError.of("S403", f"`{path}` is not JSON ({error})") from None
    if not isinstance(data, dict):
        raise CheckpointError.of("S403", f"`{path}` is not a JSON object")
    if data.get("quantization_config") and not quantized:
        raise CheckpointError.of(
            "S406",
            f"the model in `{directory}` is quantized already",
            help="start from the 16-bit model and write `quantize base nf4` in the program",
        )
    _require_transformers()
    from transformers import AutoConfig

    with quiet(), _told(directory):
        settings = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if hasattr(settings, "quantization_config"):
        del settings.quantization_config
    return settings


def find_class(name: str) -> Any | None:
    """The transformers class of that name, or None."""
    import transformers

    found = getattr(transformers, name, None)
    if found is None or not issubclass(found, transformers.PreTrainedModel):
        return None
    return found


def converts(model: nn.Module) -> bool:
    """Whether transformers computes with other tensors than it stores for this model, such as fused experts."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:
        return False
    return any(not isinstance(each, WeightRenaming) for each in get_model_conversion_mapping(model))


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without progress bars, advice and deprecation warnings; as it was afterwards."""
    import warnings

    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _class_and_config(directory: Path) -> tuple[Any, Any]:
    settings = config(directory)
    for name in settings.architectures or ():
        found = find_class(name)
        if found is not None:
            return found, settings
    if settings.architectures:
        raise CheckpointError.of(
            "S405",
            f"this transformers has no class {', '.join(settings.architectures)} (`{directory / 'config.json'}`)",
            help="code that comes with a model is not run; write a FILE.py:FUNCTION that returns it",
        )
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING):
        if type(settings) in mapping:
            return mapping[type(settings)], settings
    raise CheckpointError.of("S405", f"`{directory / 'config.json'}` names no architecture")


def _dtype(directory: Path, settings: Any) -> torch.dtype:
    """As `from_pretrained(dtype="auto")` decides: the config's, else the first floating tensor's, else float32."""
    import torch

    if settings.dtype is not None:
        return dtype_of(settings.dtype)
    try:
        headers: tuple[Header, ...] = check_checkpoint(directory)
    except CheckpointError:
        return torch.float32
    for header in headers:
        for tensor in header.tensors:
            if tensor.dtype in DTYPES:
                return dtype_of(DTYPES[tensor.dtype])
    return torch.float32


def dtype_of(name: Any) -> torch.dtype:
    """The dtype that a config names; float32 where it names none."""
    import torch

    dtype = getattr(torch, name) if isinstance(name, str) else name or torch.float32
    assert isinstance(dtype, torch.dtype)
    return dtype


@contextmanager
def _told(directory: Path) -> Iterator[None]:
    """Whatever transformers says about a bad directory, as one of our errors."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError.of("S405", f"the model in `{directory}` cannot be built: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _require_transformers() -> None:
    if not importlib_find("transformers"):
        raise CheckpointError.of(
            "S408", "a Hugging Face directory needs transformers", help="pip install 'model-surgery[hf]'"
        )


def importlib_find(name: str) -> bool:
    """Whether a top-level package is installed, without importing it."""
    import importlib.util

    return importlib.util.find_spec(name) is not None
