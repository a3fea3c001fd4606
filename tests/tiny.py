"""Tiny random models, one a family, with scores spread wide enough for attention to matter."""

import torch
import transformers as tf

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 120,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}

FAMILIES = {
    "llama": (tf.LlamaConfig, tf.LlamaForCausalLM, {}),
    "qwen2": (tf.Qwen2Config, tf.Qwen2ForCausalLM, {}),
    "qwen3": (tf.Qwen3Config, tf.Qwen3ForCausalLM, {}),
    "mistral": (tf.MistralConfig, tf.MistralForCausalLM, {"sliding_window": None}),
    "gemma3": (
        tf.Gemma3TextConfig,
        tf.Gemma3ForCausalLM,
        {
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "query_pre_attn_scalar": 16,
        },
    ),
}

# Attention of its own kind: softcap, and learned sinks in the denominator.
PECULIAR = {
    "gemma2": (
        tf.Gemma2Config,
        tf.Gemma2ForCausalLM,
        {"sliding_window": 24, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0},
    ),
    "gpt_oss": (
        tf.GptOssConfig,
        tf.GptOssForCausalLM,
        {"sliding_window": 24, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
}


def tiny_model(family, attention="sdpa", **changes):
    config_class, model_class, own = {**FAMILIES, **PECULIAR}[family]
    torch.manual_seed(1)
    config = config_class(**{**SMALL, **own, **changes})
    config._attn_implementation = attention
    return model_class(config).eval()


def random_ids(rows, length, seed=0):
    return torch.randint(1, 120, (rows, length), generator=torch.Generator().manual_seed(seed))
