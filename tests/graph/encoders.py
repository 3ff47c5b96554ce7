"""Small encoders, rows put in front of their tokens, and the same texts with words there to compare with."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import surgery
from surgery.anatomy.parts import Anatomy
from surgery.graph.insertion import Entrance, Insertion
from tests import zoo

WORDS = torch.tensor([7, 20, 33])
SHAPE = {
    "vocab_size": 58,
    "hidden_size": 24,
    "intermediate_size": 34,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 40,
}
MARKS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertForMaskedLM", SHAPE),
    "bert labels": ("BertConfig", "BertForTokenClassification", {**SHAPE, "num_labels": 5}),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", SHAPE),
    "xlm-roberta": ("XLMRobertaConfig", "XLMRobertaForTokenClassification", SHAPE),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForMaskedLM",
        {"vocab_size": 58, "dim": 24, "hidden_dim": 34, "n_layers": 2, "n_heads": 3, "max_position_embeddings": 40},
    ),
    "electra": ("ElectraConfig", "ElectraForMaskedLM", {**SHAPE, "embedding_size": 15}),
    "albert": ("AlbertConfig", "AlbertForMaskedLM", {**SHAPE, "embedding_size": 15}),
    "mpnet": ("MPNetConfig", "MPNetForMaskedLM", SHAPE),
    "modernbert": ("ModernBertConfig", "ModernBertForMaskedLM", {**SHAPE, **MARKS}),
    "flaubert": (
        "FlaubertConfig",
        "FlaubertWithLMHeadModel",
        {"vocab_size": 58, "emb_dim": 24, "n_layers": 2, "n_heads": 3, "max_position_embeddings": 40, "pad_index": 2},
    ),
    "t5 encoder": (
        "T5Config",
        "T5EncoderModel",
        {"vocab_size": 58, "d_model": 19, "d_kv": 5, "d_ff": 36, "num_layers": 2, "num_heads": 4},
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "vocab_size": 58,
            "d_model": 19,
            "d_kv": 5,
            "d_ff": 36,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
    ),
    "bart": (
        "BartConfig",
        "BartForConditionalGeneration",
        {
            "vocab_size": 58,
            "d_model": 24,
            "encoder_layers": 2,
            "decoder_layers": 3,
            "encoder_ffn_dim": 34,
            "decoder_ffn_dim": 35,
            "encoder_attention_heads": 3,
            "decoder_attention_heads": 4,
            "max_position_embeddings": 40,
            "scale_embedding": True,
        },
    ),
}
DECODING = ("t5", "bart")


def build(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    import transformers

    configuration, model, fields = MODELS[name]
    made = getattr(transformers, configuration)(**fields, **changes)
    for field in vars(made).copy():
        if "dropout" in field and isinstance(getattr(made, field), float):
            setattr(made, field, 0.0)
    with torch.random.fork_rng(devices=[]):
        built = getattr(transformers, model)(made)
    zoo.fill(built, 0)
    return built.to(dtype).eval()


@cache
def anatomy(name: str) -> Anatomy:
    return surgery.study(build(name))


class Soft(nn.Module):
    """Rows that are trained, held by the model itself."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(rows)

    def rows(self) -> Tensor:
        return self.weight


def entrance(name: str, model: nn.Module) -> Entrance:
    found = anatomy(name)
    return Entrance.find(model, found, next(stack for stack in found.stacks if stack.name == "encoder"))


def prompted(name: str, model: nn.Module, words: Tensor = WORDS) -> Insertion:
    """Rows that are the embeddings of words, in front of the model's tokens from now on."""
    at = entrance(name, model)
    with torch.no_grad():
        soft = Soft(model.get_submodule(at.lookup)(words).clone())
    model.add_module("soft", soft)
    insertion = Insertion(at, soft.rows)
    insertion.install(model)
    return insertion


def batch(model: Any, padding: str = "left", length: int = 8, by: int = 3) -> dict[str, Tensor]:
    """Two texts, the first of which is padded."""
    ids = torch.randint(5, 58, (2, length), generator=zoo.seeded(3, "insertion"))
    mask = torch.ones_like(ids)
    place = {"left": slice(0, by), "right": slice(length - by, length), "none": slice(0, 0)}[padding]
    mask[0, place] = 0
    ids[0, place] = model.config.pad_token_id or 0
    fed = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        fed["decoder_input_ids"] = torch.randint(5, 58, (2, 4), generator=zoo.seeded(4, "insertion"))
    return fed


def lefts(mask: Tensor) -> list[int]:
    return [int((row.cumsum(0) == 0).sum()) for row in mask]


def joined(front: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """What a tokenizer makes of texts that begin with more words: padding on the left stays in front of these."""
    rows = [torch.cat([row[:left], front, row[left:]]) for row, left in zip(values, lefts(mask), strict=True)]
    return torch.stack(rows)


def with_words(fed: dict[str, Tensor]) -> dict[str, Tensor]:
    mask = fed["attention_mask"]
    ids = joined(WORDS, fed["input_ids"], mask)
    return {**fed, "input_ids": ids, "attention_mask": joined(torch.ones_like(WORDS), mask, mask)}


def without_words(values: Tensor, mask: Tensor) -> Tensor:
    n = len(WORDS)
    rows = [torch.cat([row[:left], row[left + n :]]) for row, left in zip(values, lefts(mask), strict=True)]
    return torch.stack(rows)


def first(model: nn.Module, fed: dict[str, Any], **more: Any) -> Tensor:
    out: Tensor = model(**fed, **more)[0]
    return out


def close(got: Tensor, want: Tensor, bound: float) -> bool:
    return got.shape == want.shape and bool((got - want).abs().max() <= bound * want.abs().max())
