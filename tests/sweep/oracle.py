"""What module names say about roles. Used by the sweep alone: the compiler never looks at names.

Names are an oracle only where they are plain: a rule fires on the first pattern found in `path:parameter` and lists the
roles that are right there. What no rule knows is not judged.
"""

from __future__ import annotations

import re
from typing import Any

Q, K, V, O = (frozenset({f"attn.{x}", f"cross.{x}"}) for x in "qkvo")  # noqa: E741
UP, GATE, DOWN = frozenset({"ffn.up"}), frozenset({"ffn.gate"}), frozenset({"ffn.down"})
MIXER = frozenset({"mixer.in", "mixer.out"})
ANY_FFN = UP | GATE | DOWN
FUSED = Q | K | V
MIXERS = r"(mamba|mixer|linear_attn|temporal_block|mlstm_layer)"
FEEDS = r"(mlp|ffn|feed_forward|shared_experts?|mlp_block)"

RULES: tuple[tuple[str, frozenset[str]], ...] = (
    (r"(lm_head|lm_loss|vocab_projector|pred_layer|embed_out|output_projection:)", frozenset({"head"})),
    (r"hyper_connection|_hc:|per_layer_|low_rank|lora_", frozenset()),
    (r"(pooler|transform|projection_head)\b", frozenset()),
    (r"token_type_embed|segment_embed", frozenset({"lookup", "embed"})),
    (r"(position|pos)[a-z_]*embed|embed_positions|wpe|relative_attention_bias", frozenset({"position", "lookup"})),
    (r"word_embed|embed_tokens|wte\b|tok_embeddings", frozenset({"embed", "head"})),
    (r"rg_lru", MIXER),
    (rf"{MIXERS}\.(in_proj|in_proj_\w+|linear_[xy])\b", frozenset({"mixer.in"})),
    (rf"{MIXERS}\.(out_proj|linear_out)\b", frozenset({"mixer.out"})),
    (r"(mamba|mixer)\.(x_proj|dt_proj)\b", frozenset()),
    (r"\brouter\b|\bgate:weight|\.gate:weight|router\.(layer|gate|classifier)", frozenset({"router", "ffn.gate"})),
    (r"shared_expert_gate", frozenset()),
    (r"experts.*(gate_up_proj)", UP | GATE | {"experts"}),
    (r"experts.*up_proj", UP | {"experts"}),
    (r"experts.*gate_proj", GATE | {"experts"}),
    (r"experts.*down_proj", DOWN | {"experts"}),
    (r"(self_attn|attn|attention)\.(gate_proj|g_proj|dt_proj|b_proj|f_proj|r_proj|sink_proj)", MIXER),
    (r"(q_a_proj|kv_a_proj_with_mqa|q_a\b)", K),
    (r"kv_b_proj", K | V),
    (r"(qkv|c_attn|Wqkv|query_key_value|kv_proj|in_proj_weight|self\.in_proj|attn\.in_proj)", FUSED | MIXER),
    (r"attention\.(self|attention|self_attention)?\.?output\.(dense|o)\b|attention\.output:", O | MIXER),
    (r"(attention|attn|attentions\.\d+|self_attention|EncDecAttention|SelfAttention)\.(output\.dense|dense|out_lin|out_proj|"
     r"o_proj|c_proj|Wo|wo|o|attention_out|project_o)\b", O | MIXER),
    (r"(self|attention|attn|encoder_attn)\.\d*\.?(query|q_proj|q_lin|Wq|wq|q|project_q|query_proj)\b", Q | MIXER),
    (r"(self|attention|attn|encoder_attn)\.\d*\.?(key|k_proj|k_lin|Wk|wk|k|project_k|key_proj)\b", K | MIXER),
    (r"(self|attention|attn|encoder_attn)\.\d*\.?(value|v_proj|v_lin|Wv|wv|v|project_v|value_proj)\b", V | MIXER),
    (r"gate_up_proj|\bWi\b", UP | GATE),
    (rf"{FEEDS}\.(gate_proj|wi_0|w1|proj_up_gate)\b", GATE | UP),
    (rf"{FEEDS}\.(up_proj|c_fc|fc_in|dense_h_to_4h|w3|proj_up)\b", UP),
    (rf"{FEEDS}\.(down_proj|fc_out|dense_4h_to_h|w2|Wo|proj_down|c_proj)\b", DOWN),
    (r"intermediate\.dense", UP),
    (r"(?<!attention\.)output\.dense", DOWN),
    (r"\bfc1\b|\blin1\b", UP | GATE),
    (r"\bfc2\b|\blin2\b", DOWN),
)  # fmt: skip


def wrong(part: dict[str, Any]) -> str | None:
    """What is wrong about a part's label according to its name; None where nothing is."""
    if part["kind"] not in ("projection", "experts", "lookup") or part["role"] in ("linear", "lookup"):
        return None
    name = f"{part['path']}:{part.get('parameter', 'weight')}"
    for pattern, right in RULES:
        if re.search(pattern, name):
            return None if part["role"] in right else f"{name} is not {part['role']}"
    return None


def missing(row: dict[str, Any]) -> list[str]:
    """Attention layers of a studied model that lack one of q, k, v, o."""
    layers: dict[tuple[Any, Any], set[str]] = {}
    for part in row["parts"]:
        layers.setdefault((part.get("stack"), part.get("layer")), set()).add(part["role"])
    found = []
    for (stack, layer), roles in layers.items():
        for family in ("attn", "cross"):
            lacks = [x for x in "qkvo" if f"{family}.{x}" not in roles]
            if layer is not None and family in roles and lacks:
                found.append(f"{stack} {layer}: no {family}.{','.join(lacks)}")
    return found
