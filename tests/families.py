"""The model families of the default tests: how to build a tiny one, and what becomes of it.

A few for each kind of attention. `tests/survey.py` goes through all that Transformers has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers as tf
from transformers.models.gptj import modeling_gptj


@dataclass(frozen=True)
class Family:
    """One family, or one way to configure it.

    Attributes:
        config: name of its config class in Transformers.
        model: name of its class for causal language modelling; empty where no model is built.
        attention: what its attention does, for the reader.
        fields: of the config; the others are those of `tests.tiny.SMALL`, or the class's own if no model is built.
        refusal: pattern of the message of the refusal; empty for a family that works.
    """

    config: str
    model: str
    attention: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    refusal: str = ""

    @property
    def status(self) -> str:
        """Either "works" or "refused"."""
        return "refused" if self.refusal else "works"

    @property
    def missing(self) -> bool:
        """Whether this version of Transformers does not have it."""
        return not all(hasattr(tf, name) for name in (self.config, self.model) if name)


EXPERTS = {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
SLIDING = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}

_NORMS = "norms on queries and keys"
_PART = "rotary positions on some channels"


def _works(name: str, attention: str, config: str = "", **fields: Any) -> Family:
    return Family(config or f"{name}Config", f"{name}ForCausalLM", attention, fields)


def _refused(config: str, attention: str, refusal: str, **fields: Any) -> Family:
    return Family(config, "", attention, fields, refusal)


REGISTRY: dict[str, Family] = {
    # Every layer compressed.
    "llama": _works("Llama", "plain"),
    "mistral": _works("Mistral", "plain", sliding_window=None),
    "mixtral": _works("Mixtral", "plain", **EXPERTS),
    "qwen2": _works("Qwen2", "plain"),
    "gemma": _works("Gemma", "plain"),
    "olmo": _works("Olmo", "plain", clip_qkv=2.0),
    "starcoder2": _works("Starcoder2", "plain"),
    "ministral3": _works("Ministral3", "plain", max_position_embeddings=262144),
    "seed_oss": _works("SeedOss", "plain"),
    "phi3": _works("Phi3", "plain"),
    "phi3_wide": _works("Phi3", "plain", sliding_window=262144),
    "qwen2_moe": _works("Qwen2Moe", "plain", **EXPERTS, shared_expert_intermediate_size=32),
    "qwen3": _works("Qwen3", _NORMS),
    "qwen3_moe": _works("Qwen3Moe", _NORMS, **EXPERTS),
    "olmo2": _works("Olmo2", _NORMS),
    "apertus": _works("Apertus", _NORMS, max_position_embeddings=65536),
    "minimax_m2": _works("MiniMaxM2", _NORMS, **EXPERTS),
    "granite": _works("Granite", "a scale of its own", attention_multiplier=0.4),
    "smollm3": _works("SmolLM3", "layers without positions", no_rope_layers=[1, 0, 1]),
    "stablelm": _works("StableLm", _PART, qk_layernorm=True),
    "phi": _works("Phi", _PART),
    "gpt_neox": _works("GPTNeoX", _PART),
    "glm4": _works("Glm4", _PART),
    "glm4_moe": _works("Glm4Moe", _PART, use_qk_norm=True, first_k_dense_replace=1, **EXPERTS),
    "nemotron": _works("Nemotron", _PART),
    "cohere": _works("Cohere", "rotary positions in pairs", logit_scale=1.0),
    "opt": _works("OPT", "learned positions", word_embed_proj_dim=64, ffn_dim=96),
    "gpt2": Family("GPT2Config", "GPT2LMHeadModel", "learned positions"),
    # Some layers compressed.
    "gemma2": _works(
        "Gemma2",
        "softcap, a scale of its own, sliding layers",
        query_pre_attn_scalar=5,
        attn_logit_softcapping=2.0,
        **SLIDING,
    ),
    "gemma3": _works(
        "Gemma3", "a scale of its own, sliding layers", config="Gemma3TextConfig", query_pre_attn_scalar=30, **SLIDING
    ),
    "gemma4": _works(
        "Gemma4",
        "no scale, values from keys, sliding layers",
        config="Gemma4TextConfig",
        global_head_dim=32,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=120,
        **SLIDING,
    ),
    "gpt_oss": _works("GptOss", "attention sinks, sliding layers", **EXPERTS, **SLIDING),
    "cohere2": _works("Cohere2", "sliding layers, others without positions", logit_scale=1.0, **SLIDING),
    "exaone4": _works("Exaone4", "sliding layers, others without positions", **SLIDING),
    "olmo3": _works("Olmo3", "sliding layers", **SLIDING),
    "qwen2_mixed": _works("Qwen2", "sliding layers", use_sliding_window=True, **SLIDING),
    "ministral": _works("Ministral", "sliding layers", **SLIDING),
    "llama4": Family(
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        "layers in chunks, others without positions",
        {
            **EXPERTS,
            "intermediate_size_mlp": 96,
            "attention_chunk_size": 24,
            "layer_types": ["chunked_attention", "chunked_attention", "full_attention"],
            "no_rope_layers": [1, 1, 0],
        },
    ),
    "phi3_longrope": Family(
        "Phi3Config",
        "Phi3ForCausalLM",
        "two sets of rotary frequencies",
        {
            "original_max_position_embeddings": 1024,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 8,
                "long_factor": [4.0] * 8,
                "original_max_position_embeddings": 1024,
            },
        },
    ),
    "qwen3_next": _works(
        "Qwen3Next",
        "gated delta-net layers",
        shared_expert_intermediate_size=32,
        **EXPERTS,
        **LINEAR,
    ),
    "qwen3_5": _works("Qwen3_5", "gated delta-net layers", config="Qwen3_5TextConfig", **LINEAR),
    "lfm2": _works(
        "Lfm2",
        "short convolutions",
        layer_types=["conv", "full_attention", "full_attention"],
        block_multiple_of=16,
    ),
    "granite4": _works(
        "GraniteMoeHybrid",
        "Mamba layers, a scale of its own",
        layer_types=["mamba", "attention", "attention"],
        attention_multiplier=0.4,
        **EXPERTS,
        **MAMBA,
    ),
    "jamba": _works(
        "Jamba",
        "Mamba layers",
        attn_layer_offset=1,
        attn_layer_period=2,
        mamba_d_state=8,
        **EXPERTS,
    ),
    "bamba": _works("Bamba", "Mamba layers", attn_layer_indices=[1, 2], **MAMBA),
    # Refused.
    "mistral_sliding": _refused(
        "MistralConfig",
        "sliding layers only",
        "no full-attention layer",
        sliding_window=24,
    ),
    "deepseek_v2": _refused("DeepseekV2Config", "latent (MLA)", "latent"),
    "deepseek_v3": _refused("DeepseekV3Config", "latent (MLA)", "latent"),
    "t5": _refused("T5Config", "encoder and decoder", "encoder-decoder"),
    "gemma3n": _refused("Gemma3nTextConfig", "later layers read earlier ones' keys", "share"),
    "gemma4_pass_state": _refused(
        "Gemma4TextConfig",
        "later layers read earlier ones' keys",
        "share",
        num_kv_shared_layers=10,
    ),
    "diffllama": _refused("DiffLlamaConfig", "difference of two attentions", "DiffLlama"),
    "bloom": _refused("BloomConfig", "ALiBi", "Bloom"),
    "mpt": _refused("MptConfig", "ALiBi", "Mpt"),
    "falcon": _refused("FalconConfig", "ALiBi or rotary", "Falcon"),
    "gptj": (
        _works("GPTJ", _PART, rotary_dim=8)
        if hasattr(modeling_gptj, "ALL_ATTENTION_FUNCTIONS")  # from Transformers 5.24 on
        else _refused("GPTJConfig", _PART, "GPTJ")
    ),
    "doge": _refused("DogeConfig", "a mask of its own", "makes a mask of its own"),
    "jetmoe": _refused("JetMoeConfig", "keys repeated after they are cached", "changes keys or values"),
    "git": _refused("GitConfig", "image blocks", "attends in a way of its own"),
    "minimax": _refused("MiniMaxConfig", "lightning attention", "no cache but its own MiniMaxCache"),
    "mllama": _refused("MllamaConfig", "cross-attention to an image", "attend across to an image"),
    "dory": _refused("DoryConfig", "layers that run twice", "runs layers again"),
    "kosmos2": _refused("Kosmos2Config", "masks of its own", "makes its masks by itself"),
    "gemma3_encoder": _refused("Gemma3TextConfig", "an encoder", "see later ones", use_bidirectional_attention=True),
    "dots3_note": _refused("Dots3NoteTextConfig", "latent (MLA), fields that differ from layer to layer", "latent"),
    "blt": _refused("BltConfig", "bytes in patches", "cannot tell its layers"),
    "bert_encoder": _refused("BertConfig", "an encoder", "is_decoder=False makes it an encoder"),
    "idefics_norms": _refused(
        "IdeficsConfig", "norms on keys from the cache", "changes keys or values", qk_layer_norms=True
    ),
    "falcon_h1": _refused("FalconH1Config", "Mamba and attention in one layer", "LinearAttentionAndFullAttentionLayer"),
    "zamba2": _refused("Zamba2Config", "Mamba and attention in one layer", "LinearAttentionAndFullAttentionLayer"),
}
