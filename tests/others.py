"""Small models of more families than the zoo has: attention of their own, windows, encoder-decoders and others."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch

import surgery
from surgery.anatomy.parts import Anatomy
from tests import zoo

_LLAMA = {
    "hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "vocab_size": 61,
}  # fmt: skip
_BART = {
    "d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 3, "decoder_attention_heads": 3,
    "encoder_ffn_dim": 35, "decoder_ffn_dim": 33, "vocab_size": 61, "max_position_embeddings": 64,
}  # fmt: skip
_T5 = {
    "d_model": 19, "d_kv": 5, "d_ff": 36, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "vocab_size": 62,
    "decoder_start_token_id": 0, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12,
}  # fmt: skip
_BERT = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 35, "vocab_size": 61,
    "max_position_embeddings": 64,
}  # fmt: skip
_LATENT = {
    "hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 3, "vocab_size": 61, "kv_lora_rank": 8, "q_lora_rank": 10, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6, "v_head_dim": 7, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_FALCON = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61, "ffn_hidden_size": 36,
}  # fmt: skip
_GPTJ = {"n_layer": 2, "rotary_dim": 4, "vocab_size": 61, "n_positions": 64}
_SHAPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "falcon": ("Falcon", "ForCausalLM", _FALCON),
    "falcon-grouped": ("Falcon", "ForCausalLM", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-alibi": ("Falcon", "ForCausalLM", {**_FALCON, "alibi": True, "multi_query": False}),
    "bloom": ("Bloom", "ForCausalLM", {"hidden_size": 24, "n_layer": 2, "n_head": 3, "vocab_size": 61}),
    "gptj": ("GPTJ", "ForCausalLM", {**_GPTJ, "n_embd": 24, "n_head": 3}),
    "codegen": ("CodeGen", "ForCausalLM", {**_GPTJ, "n_embd": 32, "n_head": 4, "n_ctx": 64}),
    "mpt": ("Mpt", "ForCausalLM", {"d_model": 24, "n_heads": 3, "n_layers": 2, "vocab_size": 61, "max_seq_len": 64}),
    "xglm": ("XGLM", "ForCausalLM", {"d_model": 24, "attention_heads": 3, "num_layers": 2, "ffn_dim": 35,
                                     "vocab_size": 61, "max_position_embeddings": 64}),
    "gpt_neo": ("GPTNeo", "ForCausalLM", {"hidden_size": 24, "num_layers": 2, "num_heads": 3, "vocab_size": 61,
                                          "attention_types": [[["global", "local"], 1]], "window_size": 4,
                                          "max_position_embeddings": 64}),
    "gpt_neox_japanese": ("GPTNeoXJapanese", "ForCausalLM", {"hidden_size": 24, "num_hidden_layers": 2,
                                                             "vocab_size": 61, "num_attention_heads": 3,
                                                             "rotary_pct": 0.5}),
    "trocr": ("TrOCR", "ForCausalLM", {**_BART, "is_decoder": True}),
    "rembert": ("RemBert", "ForCausalLM", {**_BERT, "is_decoder": True, "input_embedding_size": 24,
                                           "output_embedding_size": 24}),
    "roformer": ("RoFormer", "ForCausalLM", {**_BERT, "is_decoder": True}),
    "megatron-bert": ("MegatronBert", "ForMaskedLM", _BERT),
    "cpmant": ("CpmAnt", "ForCausalLM", {"hidden_size": 24, "num_attention_heads": 3, "dim_head": 8, "dim_ff": 35,
                                         "num_hidden_layers": 2, "vocab_size": 61}),
    "ctrl": ("CTRL", "LMHeadModel", {"n_embd": 24, "n_layer": 2, "n_head": 3, "dff": 35, "vocab_size": 61,
                                     "n_positions": 64}),
    "mistral": ("Mistral", "ForCausalLM", {**_LLAMA, "sliding_window": 4}),
    "gemma2": ("Gemma2", "ForCausalLM", {**_LLAMA, "sliding_window": 4}),
    "gemma3": ("Gemma3", "ForCausalLM", {**_LLAMA, "sliding_window": 4,
                                         "layer_types": ["sliding_attention", "full_attention"]}),
    "qwen3": ("Qwen3", "ForCausalLM", _LLAMA),
    "gpt_bigcode": ("GPTBigCode", "ForCausalLM", {"n_embd": 24, "n_layer": 2, "n_head": 3, "vocab_size": 61,
                                                  "n_positions": 64}),
    "deepseek_v2": ("DeepseekV2", "ForCausalLM", _LATENT),
    "deepseek_v3": ("DeepseekV3", "ForCausalLM", _LATENT),
    "diffllama": ("DiffLlama", "ForCausalLM", _LLAMA),
    "llama4": ("Llama4", "ForCausalLM", {**_LLAMA, "intermediate_size_mlp": 35, "attention_chunk_size": 4,
                                         "num_local_experts": 2}),
    "jamba": ("Jamba", "ForCausalLM", {**{name: size for name, size in _LLAMA.items() if name != "head_dim"},
                                       "intermediate_size": 36, "use_mamba_kernels": False, "attn_layer_period": 2,
                                       "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4,
                                       "pad_token_id": 0}),
    "bart": ("Bart", "ForConditionalGeneration", _BART),
    "marian": ("Marian", "MTModel", {**_BART, "pad_token_id": 0, "decoder_start_token_id": 0}),
    "mvp": ("Mvp", "ForConditionalGeneration", _BART),
    "t5": ("T5", "ForConditionalGeneration", _T5),
    "umt5": ("UMT5", "ForConditionalGeneration", _T5),
    "deberta_v2": ("DebertaV2", "ForMaskedLM", {**_BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "mpnet": ("MPNet", "ForMaskedLM", _BERT),
}  # fmt: skip
BY_CACHE = ("falcon", "falcon-grouped", "falcon-alibi", "bloom", "gptj", "codegen", "mpt", "xglm", "gpt_neo")
WINDOWED = ("mistral", "gemma2", "gemma3")
PAIRED = ("bart", "marian", "mvp", "t5", "umt5")
IDS = (5, 9, 33, 12, 17)
TEXT = " ".join(map(str, IDS))


def ids_of(text: str) -> list[int]:
    """A tokenizer of numbers."""
    return [int(word) for word in text.split()]


def tiny(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A small random model in eval mode, without dropout, that never stops generating by itself."""
    import transformers

    family, ending, fields = _SHAPES[name]
    prefix = f"{family}Text" if family in ("Gemma3", "Llama4") else family
    config = getattr(transformers, f"{prefix}Config")(**{**fields, **changes})
    for field, value in list(vars(config).items()):
        if ("drop" in field or field.endswith("_pdrop")) and isinstance(value, float):
            setattr(config, field, 0.0)
    with torch.random.fork_rng(devices=[]):
        model = getattr(transformers, f"{family}{ending}")(config)
    zoo.fill(model, seed)
    if model.can_generate():
        model.generation_config.pad_token_id = 0
        model.generation_config.eos_token_id = None
        model.generation_config.forced_eos_token_id = None
    return model.to(dtype).eval()


@cache
def anatomy(name: str) -> Anatomy:
    return surgery.study(tiny(name))


def apply(program: str, name: str, model: Any) -> Any:
    """The model, one of that name, transformed; texts are numbers."""
    plan = surgery.plan(surgery.parse(program), model, tokenizer=ids_of, anatomy=anatomy(name))
    return surgery.apply(plan, model, tokenizer=ids_of)


def pair(program: str, name: str, **changes: Any) -> tuple[Any, Any]:
    """The base, and the same model transformed."""
    base = tiny(name, **changes)
    return base, apply(program, name, copy.deepcopy(base))


def inputs(model: Any, length: int = 7) -> dict[str, torch.Tensor]:
    """Two rows, and as many for the decoder where there is one."""
    x = zoo.tokens(60, 2, length)
    paired = {"decoder_input_ids": zoo.tokens(60, 2, length - 2, seed=1)} if model.config.is_encoder_decoder else {}
    return {"input_ids": x, "attention_mask": torch.ones_like(x), **paired}
