"""Small random models of every family, with awkward sizes; the same seed gives the same bits.

Widths are odd where the family allows it, key-value heads are fewer than heads, every bias and norm weight is random
(an initialised norm is all ones, a bias all zeros: both hide mistakes), and no two dimensions agree by accident.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Inputs = dict[str, Tensor]

_SHAPES: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 24,
        "intermediate_size": 37,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "vocab_size": 61,
        "tie_word_embeddings": False,
    },
    "qwen2": {
        "hidden_size": 20,
        "intermediate_size": 35,
        "num_hidden_layers": 3,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "vocab_size": 59,
        "tie_word_embeddings": True,
    },
    "gemma": {
        "hidden_size": 18,
        "intermediate_size": 41,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 10,
        "vocab_size": 67,
        "tie_word_embeddings": True,
    },
    "phi3": {
        "hidden_size": 30,
        "intermediate_size": 43,
        "num_hidden_layers": 3,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "vocab_size": 53,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    },
    "mixtral": {  # grouped products want rows of 16 bytes
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "vocab_size": 61,
        "tie_word_embeddings": False,
    },
    "qwen2_moe": {
        "hidden_size": 16,
        "intermediate_size": 20,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 33,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "vocab_size": 59,
        "tie_word_embeddings": False,
    },
    "gpt_oss": {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "vocab_size": 57,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    },
    "gpt2": {
        "n_embd": 21,
        "n_inner": 38,
        "n_layer": 3,
        "n_head": 3,
        "vocab_size": 57,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neox": {
        "hidden_size": 24,
        "intermediate_size": 39,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "rotary_pct": 0.5,
        "vocab_size": 55,
        "tie_word_embeddings": False,
    },
    "opt": {
        "hidden_size": 22,
        "word_embed_proj_dim": 22,
        "ffn_dim": 45,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "vocab_size": 63,
        "max_position_embeddings": 64,
        "pad_token_id": 1,
    },
    "bert": {
        "hidden_size": 21,
        "intermediate_size": 34,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "vocab_size": 58,
        "max_position_embeddings": 64,
    },
    "t5": {
        "d_model": 19,
        "d_kv": 5,
        "d_ff": 36,
        "num_layers": 2,
        "num_decoder_layers": 3,
        "num_heads": 4,
        "vocab_size": 62,
        "decoder_start_token_id": 0,
    },
}
_CLASSES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "gemma": ("GemmaConfig", "GemmaForCausalLM"),
    "phi3": ("Phi3Config", "Phi3ForCausalLM"),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM"),
    "qwen2_moe": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM"),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM"),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel"),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM"),
    "opt": ("OPTConfig", "OPTForCausalLM"),
    "bert": ("BertConfig", "BertForMaskedLM"),
    "t5": ("T5Config", "T5ForConditionalGeneration"),
}

EXPERTS: tuple[str, ...] = ("mixtral", "qwen2_moe", "gpt_oss")
FAMILIES: tuple[str, ...] = tuple(family for family in _SHAPES if family not in EXPERTS)
CAUSAL: tuple[str, ...] = ("llama", "qwen2", "gemma", "phi3", "gpt2", "gpt_neox", "opt")
FUSED: tuple[str, ...] = ("phi3", "gpt2", "gpt_neox")
PLAIN: tuple[str, ...] = ("nano", "byhand")


def seeded(seed: int, name: str) -> torch.Generator:
    """A generator of its own for each name, so that a model's bits do not depend on the order of its parameters."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


@torch.no_grad()
def fill(model: nn.Module, seed: int) -> None:
    """Every parameter random, at a scale that keeps activations near one. Tied weights are drawn once."""
    for name, parameter in model.named_parameters():
        draw = torch.randn(parameter.shape, generator=seeded(seed, name), dtype=torch.float64)
        if parameter.dim() > 1:
            value = draw * parameter.shape[-1] ** -0.5
        elif name.endswith("bias"):
            value = 0.1 * draw
        else:
            value = 1 + 0.2 * draw
        parameter.copy_(value)


def config(family: str, **changes: Any) -> Any:
    """The family's configuration: no dropout, odd sizes; `changes` override."""
    import transformers

    fields = {**_SHAPES[family], **changes}
    made = getattr(transformers, _CLASSES[family][0])(**fields)
    for name in vars(made).copy():
        if ("dropout" in name or name.endswith("_pdrop")) and isinstance(getattr(made, name), float):
            setattr(made, name, 0.0)
    return made


def tiny(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A small random transformers model in eval mode. `changes` are fields of its configuration."""
    import transformers

    with torch.random.fork_rng(devices=[]):
        model = getattr(transformers, _CLASSES[family][1])(config(family, **changes))
    fill(model, seed)
    if model.can_generate():
        model.generation_config.pad_token_id = model.config.pad_token_id or 0
    return model.to(dtype).eval()


def tokens(vocabulary: int, batch: int = 2, length: int = 7, seed: int = 0) -> Tensor:
    """Random token numbers that avoid the first three (padding and the like)."""
    return torch.randint(3, vocabulary, (batch, length), generator=seeded(seed, "tokens"))


def inputs(model: Any, batch: int = 2, length: int = 7, seed: int = 0) -> Inputs:
    """Keyword arguments of the model's forward, without padding and without a cache."""
    configuration = model.config
    ids = tokens(configuration.vocab_size, batch, length, seed)
    fed: Inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if configuration.is_encoder_decoder:
        fed["decoder_input_ids"] = tokens(configuration.vocab_size, batch, length - 2, seed + 1)
    return fed


def padded(model: Any, length: int = 7, padding: int = 3, seed: int = 0) -> Inputs:
    """Two rows, the first of which has `padding` places of padding on the left."""
    fed = inputs(model, 2, length, seed)
    fed["attention_mask"][0, :padding] = 0
    fed["input_ids"][0, :padding] = model.config.pad_token_id or 0
    return fed


@torch.no_grad()
def logits(model: nn.Module, fed: Inputs | tuple[Tensor, ...]) -> Tensor:
    """The model's logits (batch, length, vocabulary), computed without a cache."""
    if isinstance(fed, tuple):
        out: Tensor = model(*fed)
        return out
    causal = not model.config.is_encoder_decoder and model.config.model_type != "bert"
    extra = {"use_cache": False} if causal or model.config.is_encoder_decoder else {}
    result = model(**fed, **extra)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


class NanoBlock(nn.Module):
    """A nanoGPT-style block: one projection for q, k and v, `F.scaled_dot_product_attention`, gelu."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.before = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width, bias=False)
        self.after = nn.LayerNorm(width)
        self.wide = nn.Linear(width, inner)
        self.narrow = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.before(x)).split(width, dim=2)
        q = q.view(batch, length, self.heads, -1).transpose(1, 2)
        k = k.view(batch, length, self.heads, -1).transpose(1, 2)
        v = v.view(batch, length, self.heads, -1).transpose(1, 2)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.narrow(F.gelu(self.wide(self.after(x))))


class ByHandBlock(nn.Module):
    """Attention written out: scores, a causal mask, softmax, weighted sum; separate projections; relu."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.before = nn.LayerNorm(width)
        self.wq = nn.Linear(width, width)
        self.wk = nn.Linear(width, width, bias=False)
        self.wv = nn.Linear(width, width)
        self.wo = nn.Linear(width, width)
        self.after = nn.LayerNorm(width)
        self.lift = nn.Linear(width, inner)
        self.drop = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        each = width // self.heads
        h = self.before(x)
        q = self.wq(h).view(batch, length, self.heads, each).transpose(1, 2)
        k = self.wk(h).view(batch, length, self.heads, each).transpose(1, 2)
        v = self.wv(h).view(batch, length, self.heads, each).transpose(1, 2)
        scores = torch.matmul(q, k.transpose(-2, -1)) / each**0.5
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        weights = torch.softmax(scores.masked_fill(later, float("-inf")), dim=-1)
        mixed = torch.matmul(weights, v).transpose(1, 2).reshape(batch, length, width)
        x = x + self.wo(mixed)
        return x + self.drop(torch.relu(self.lift(self.after(x))))


class PlainDecoder(nn.Module):
    """Token and learned position embeddings, a list of blocks, a norm and a head that may be tied to the embedding."""

    def __init__(
        self,
        block: Callable[[int, int, int], nn.Module],
        vocabulary: int = 51,
        width: int = 21,
        heads: int = 3,
        inner: int = 44,
        depth: int = 3,
        longest: int = 48,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.place = nn.Embedding(longest, width)
        self.blocks = nn.ModuleList(block(width, heads, inner) for _ in range(depth))
        self.last = nn.LayerNorm(width)
        self.lm = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.lm.weight = self.token.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.place(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.lm(self.last(x))


_BLOCKS: dict[str, Callable[[int, int, int], nn.Module]] = {"nano": NanoBlock, "byhand": ByHandBlock}


def plain(name: str, *, dtype: torch.dtype = torch.float64, seed: int = 0, **sizes: Any) -> PlainDecoder:
    """A model of plain torch, `nano` or `byhand`, in eval mode."""
    model = PlainDecoder(_BLOCKS[name], **sizes)
    fill(model, seed)
    return model.to(dtype).eval()


@dataclass(frozen=True)
class Specimen:
    """A model with inputs for it, however it is called."""

    name: str
    model: Any
    inputs: Inputs | tuple[Tensor, ...]

    @property
    def example(self) -> tuple[Tensor, ...] | None:
        """What `study`, `plan` and `apply` want as `example_inputs`: nothing for transformers models."""
        return self.inputs if isinstance(self.inputs, tuple) else None

    def logits(self) -> Tensor:
        return logits(self.model, self.inputs)


def specimen(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Specimen:
    """Any model of the zoo by name: a family, `nano` or `byhand`."""
    if name in PLAIN:
        model = plain(name, dtype=dtype, seed=seed, **changes)
        return Specimen(name, model, (tokens(model.token.num_embeddings, seed=seed),))
    model = tiny(name, dtype=dtype, seed=seed, **changes)
    return Specimen(name, model, inputs(model, seed=seed))


def tokenizer(vocabulary: int = 51) -> Any:
    """A word-level tokenizer with `vocabulary` words, `w0` to ...; unknown words are number 2, padding is number 0."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<end>": 1, "<unknown>": 2} | {f"w{i}": i for i in range(3, vocabulary)}
    core = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unknown>", pad_token="<pad>", eos_token="<end>", padding_side="left"
    )
