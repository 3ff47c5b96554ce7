"""A directory that PEFT wrote, as plain data: its configuration, every field known, and its tensors by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from surgery.checkpoint import tensors as files
from surgery.checkpoint.header import PICKLES, read_header
from surgery.errors import CheckpointError

WEIGHTS = "adapter_model.safetensors"
# Fields of every method that are about files, training or starting, and not about what is computed.
ABOUT = (
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "modules_to_save",
)  # fmt: skip
PROMPT = (
    *ABOUT, "num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers",
)  # fmt: skip
FIELDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "LORA": (
            *ABOUT, "r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters", "exclude_modules",
            "fan_in_fan_out", "bias", "use_rslora", "use_dora", "lora_bias", "init_lora_weights", "rank_pattern",
            "alpha_pattern", "layers_to_transform", "layers_pattern", "megatron_core", "loftq_config", "eva_config",
            "corda_config", "lora_ga_config", "qalora_group_size", "ensure_weight_tying",
        ),
        "IA3": (
            *ABOUT, "target_modules", "exclude_modules", "feedforward_modules", "fan_in_fan_out", "init_ia3_weights",
        ),
        "PROMPT_TUNING": (
            *PROMPT, "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
        ),
        "P_TUNING": (
            *PROMPT, "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout",
        ),
        "PREFIX_TUNING": (*PROMPT, "init_weights", "encoder_hidden_size", "prefix_projection"),
    }
)  # fmt: skip
"""By method, the fields that are read, or that a finished adapter does not depend on."""


@dataclass(frozen=True)
class Given:
    """What a directory holds. where: how to speak of it."""

    where: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def method(self) -> str:
        """PEFT's name for it: LORA."""
        return str(self.config["peft_type"])

    def count(self, name: str) -> int:
        """A field that is a whole number above zero. Error: S452."""
        value = self.config.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise cannot(f"`{self.where}` has `{name}` {value!r}, which is no count")
        return value


def read(directory: Path) -> Given:
    """Errors: S410 to S413 the files, S452 what is not an adapter of PEFT or has fields that are not known."""
    config = _config(directory / "adapter_config.json")
    weights = directory / WEIGHTS
    if not weights.exists():
        pickles = [path.name for path in directory.iterdir() if path.suffix in PICKLES]
        if pickles:
            raise CheckpointError.of(
                "S413",
                f"`{directory / pickles[0]}` is a pickle, which can run any code when opened; only {WEIGHTS} is read",
                help="load it with PEFT where you trust it, and save it again",
            )
    return Given(directory, config, dict(files.read(read_header(weights))))


def _config(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_text("utf-8"))
    except OSError as error:
        named = "an adapter that has a name lies in a folder of that name" if path.parent.is_dir() else ""
        raise cannot(f"`{path}` cannot be read: {error.strerror or error}", named) from None
    except (ValueError, RecursionError) as error:
        raise cannot(f"`{path}` is not JSON ({error})") from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in FIELDS:
        raise cannot(f"`{path}` is of type {kind}, and {', '.join(FIELDS)} are read", "load and merge it with PEFT")
    assert isinstance(config, dict)
    unknown = [
        name for name, value in config.items() if name not in FIELDS[kind] and value not in (None, False, [], {})
    ]
    if unknown:
        raise cannot(
            f"`{path}` has `{unknown[0]}`, which may change what is computed and which no statement of ours says",
            "load and merge it with PEFT",
        )
    return config


def cannot(what: str, help: str = "") -> CheckpointError:
    """What PEFT wrote has no words here."""
    return CheckpointError.of("S452", what, help=help)
