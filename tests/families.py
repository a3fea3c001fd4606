"""The model families that the tests know: how to build a tiny one, what its attention does, what becomes of it.

python -m tests.families prints them as a table; with --write it goes into the README.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers as tf

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- families -->\n", "<!-- /families -->\n"


@dataclass(frozen=True)
class Family:
    """One family, or one way to configure it.

    Attributes:
        title: as people call it.
        config: name of its config class in Transformers.
        model: name of its class for causal language modelling; empty where no model is built.
        attention: what its attention does, for the table.
        fields: of the config; the others are those of `tests.tiny.SMALL`, or the class's own if no model is built.
        status: "works" (every layer is compressed), "partly" or "refused".
        note: what is compressed, or why it is refused.
        refusal: pattern of the message of the refusal.
    """

    title: str
    config: str
    model: str
    attention: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    status: str = "works"
    note: str = "all layers"
    refusal: str = ""

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


def _works(title: str, name: str, attention: str, **fields: Any) -> Family:
    return Family(title, f"{name}Config", f"{name}ForCausalLM", attention, fields)


def _sliding(title: str, name: str, attention: str, config: str = "", **fields: Any) -> Family:
    fields, note = {**SLIDING, **fields}, "full-attention layers; sliding ones keep their window"
    return Family(title, config or f"{name}Config", f"{name}ForCausalLM", attention, fields, "partly", note)


def _linear(title: str, name: str, attention: str, config: str = "", **fields: Any) -> Family:
    note = "full-attention layers; linear ones keep their state"
    config, model = config or f"{name}Config", f"{name}ForCausalLM"
    return Family(title, config, model, attention, fields, "partly", note)


def _refused(title: str, config: str, attention: str, note: str, refusal: str, **fields: Any) -> Family:
    return Family(title, config, "", attention, fields, "refused", note, refusal)


REGISTRY: dict[str, Family] = {
    # Every layer compressed.
    "llama": _works("Llama", "Llama", "plain"),
    "mistral": _works("Mistral without a window", "Mistral", "plain", sliding_window=None),
    "mixtral": _works("Mixtral", "Mixtral", "plain", **EXPERTS),
    "qwen2": _works("Qwen2", "Qwen2", "plain"),
    "gemma": _works("Gemma", "Gemma", "plain"),
    "olmo": _works("OLMo", "Olmo", "plain", clip_qkv=2.0),
    "starcoder2": _works("StarCoder2 without a window", "Starcoder2", "plain"),
    "ministral3": _works("Ministral 3", "Ministral3", "plain", max_position_embeddings=262144),
    "seed_oss": _works("Seed-OSS", "SeedOss", "plain"),
    "phi3": _works("Phi-3 without a window", "Phi3", "plain"),
    "phi3_wide": _works("Phi-3 with a window wider than its positions", "Phi3", "plain", sliding_window=262144),
    "qwen2_moe": _works("Qwen2-MoE", "Qwen2Moe", "plain", **EXPERTS, shared_expert_intermediate_size=32),
    "qwen3": _works("Qwen3", "Qwen3", _NORMS),
    "qwen3_moe": _works("Qwen3-MoE", "Qwen3Moe", _NORMS, **EXPERTS),
    "olmo2": _works("OLMo 2", "Olmo2", _NORMS),
    "apertus": _works("Apertus", "Apertus", _NORMS, max_position_embeddings=65536),
    "minimax_m2": _works("MiniMax-M2", "MiniMaxM2", _NORMS, **EXPERTS),
    "granite": _works("Granite 3", "Granite", "a scale of its own", attention_multiplier=0.4),
    "smollm3": _works("SmolLM3", "SmolLM3", "layers without positions", no_rope_layers=[1, 0, 1]),
    "stablelm": _works("StableLM", "StableLm", _PART, qk_layernorm=True),
    "phi": _works("Phi", "Phi", _PART),
    "gpt_neox": _works("GPT-NeoX", "GPTNeoX", _PART),
    "glm4": _works("GLM-4", "Glm4", _PART),
    "glm4_moe": _works("GLM-4.5", "Glm4Moe", _PART, use_qk_norm=True, first_k_dense_replace=1, **EXPERTS),
    "nemotron": _works("Nemotron", "Nemotron", _PART),
    "cohere": _works("Command R", "Cohere", "rotary positions in pairs", logit_scale=1.0),
    "opt": _works("OPT", "OPT", "learned positions", word_embed_proj_dim=64, ffn_dim=96),
    "gpt2": Family("GPT-2", "GPT2Config", "GPT2LMHeadModel", "learned positions"),
    # Some layers compressed.
    "gemma2": _sliding(
        "Gemma 2",
        "Gemma2",
        "softcap, a scale of its own, sliding layers",
        query_pre_attn_scalar=5,
        attn_logit_softcapping=2.0,
    ),
    "gemma3": _sliding(
        "Gemma 3 (text)",
        "Gemma3",
        "a scale of its own, sliding layers",
        config="Gemma3TextConfig",
        query_pre_attn_scalar=30,
    ),
    "gemma4": _sliding(
        "Gemma 4 (text)",
        "Gemma4",
        "no scale, values from keys, sliding layers",
        config="Gemma4TextConfig",
        global_head_dim=32,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=120,
    ),
    "gpt_oss": _sliding("GPT-OSS", "GptOss", "attention sinks, sliding layers", **EXPERTS),
    "cohere2": _sliding(
        "Command R7B, Command A", "Cohere2", "sliding layers, others without positions", logit_scale=1.0
    ),
    "exaone4": _sliding("EXAONE 4", "Exaone4", "sliding layers, others without positions"),
    "olmo3": _sliding("OLMo 3", "Olmo3", "sliding layers"),
    "qwen2_mixed": _sliding("Qwen2 with some windows", "Qwen2", "sliding layers", use_sliding_window=True),
    "ministral": _sliding("Ministral with some windows", "Ministral", "sliding layers"),
    "llama4": Family(
        "Llama 4 (text)",
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
        "partly",
        "full-attention layers; chunked ones keep their chunk",
    ),
    "phi3_longrope": Family(
        "Phi-3 with long rope",
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
        "partly",
        "all layers, until the frequencies change; longer texts `generate()` keeps in an exact cache of its own",
    ),
    "qwen3_next": _linear(
        "Qwen3-Next",
        "Qwen3Next",
        "gated delta-net layers",
        shared_expert_intermediate_size=32,
        **EXPERTS,
        **LINEAR,
    ),
    "qwen3_5": _linear("Qwen3.5 (text)", "Qwen3_5", "gated delta-net layers", config="Qwen3_5TextConfig", **LINEAR),
    "lfm2": _linear(
        "LFM2",
        "Lfm2",
        "short convolutions",
        layer_types=["conv", "full_attention", "full_attention"],
        block_multiple_of=16,
    ),
    "granite4": _linear(
        "Granite 4",
        "GraniteMoeHybrid",
        "Mamba layers, a scale of its own",
        layer_types=["mamba", "attention", "attention"],
        attention_multiplier=0.4,
        **EXPERTS,
        **MAMBA,
    ),
    "jamba": _linear(
        "Jamba",
        "Jamba",
        "Mamba layers",
        attn_layer_offset=1,
        attn_layer_period=2,
        mamba_d_state=8,
        **EXPERTS,
    ),
    "bamba": _linear("Bamba", "Bamba", "Mamba layers", attn_layer_indices=[1, 2], **MAMBA),
    # Refused.
    "mistral_sliding": _refused(
        "Mistral with a window",
        "MistralConfig",
        "sliding layers only",
        "nothing to compress, its cache is bounded already",
        "no full-attention layer",
        sliding_window=24,
    ),
    "deepseek_v2": _refused("DeepSeek-V2", "DeepseekV2Config", "latent (MLA)", "caches latents, not keys", "latent"),
    "deepseek_v3": _refused("DeepSeek-V3", "DeepseekV3Config", "latent (MLA)", "caches latents, not keys", "latent"),
    "t5": _refused(
        "T5", "T5Config", "encoder and decoder", "the decoder also attends to the encoder", "encoder-decoder"
    ),
    "gemma3n": _refused(
        "Gemma 3n (text)",
        "Gemma3nTextConfig",
        "later layers read earlier ones' keys",
        "layers share keys and values",
        "share",
    ),
    "gemma4_shared": _refused(
        "Gemma 4 E2B and E4B",
        "Gemma4TextConfig",
        "later layers read earlier ones' keys",
        "layers share keys and values",
        "share",
        num_kv_shared_layers=10,
    ),
    "diffllama": _refused(
        "DiffLlama",
        "DiffLlamaConfig",
        "difference of two attentions",
        "splits values after they are cached",
        "DiffLlama",
    ),
    "bloom": _refused("BLOOM", "BloomConfig", "ALiBi", "attends without attention functions", "Bloom"),
    "mpt": _refused("MPT", "MptConfig", "ALiBi", "attends without attention functions", "Mpt"),
    "falcon": _refused("Falcon", "FalconConfig", "ALiBi or rotary", "attends without attention functions", "Falcon"),
    "gptj": _refused("GPT-J", "GPTJConfig", _PART, "attends without attention functions", "GPTJ"),
    "falcon_h1": _refused(
        "Falcon-H1",
        "FalconH1Config",
        "Mamba and attention in one layer",
        "layers that keep keys and a state",
        "LinearAttentionAndFullAttentionLayer",
    ),
    "zamba2": _refused(
        "Zamba2",
        "Zamba2Config",
        "Mamba and attention in one layer",
        "layers that keep keys and a state",
        "LinearAttentionAndFullAttentionLayer",
    ),
}


def table() -> str:
    """The families as a Markdown table, those alike in one row."""

    def kind(name: str) -> tuple[str, str, str]:
        family = REGISTRY[name]
        return family.attention, family.status, family.note

    rows = ["| family | its attention | status | compressed, or why not | name |", "| --- | --- | --- | --- | --- |"]
    order = ["works", "partly", "refused"]
    names = sorted(REGISTRY, key=lambda name: order.index(kind(name)[1]))
    kinds = dict.fromkeys(map(kind, names))
    for attention, status, note in kinds:
        alike = [name for name in names if kind(name) == (attention, status, note)]
        titles = ", ".join(REGISTRY[name].title for name in alike)
        keys = ", ".join(f"`{name}`" for name in alike)
        rows.append(f"| {titles} | {attention} | {status} | {note} | {keys} |")
    return "\n".join(rows) + "\n"


def block() -> str:
    """What stands between the markers of the README."""
    return (
        "\nEach family is tested with a tiny random model: "
        '`pytest tests/test_families.py -k "[NAME]"`, a name of the last column.\n\n' + table() + "\n"
    )


def split(readme: str) -> tuple[str, str, str]:
    """What stands before, between and after the markers."""
    before, _, rest = readme.partition(BEGIN)
    between, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"no {BEGIN.strip()} ... {END.strip()} in {README}")
    return before + BEGIN, between, END + after


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        before, _, after = split(README.read_text(encoding="utf-8"))
        README.write_text(before + block() + after, encoding="utf-8")
    else:
        print(table(), end="")
