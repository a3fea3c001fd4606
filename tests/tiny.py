"""Tiny random models, one a family, with scores spread wide enough for attention to matter."""

import torch
import transformers as tf

from tests.families import REGISTRY

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

# The quick set, for tests of the cache itself; tests/test_families.py goes through all.
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3")


def tiny_config(family, **changes):
    entry = REGISTRY[family]
    return getattr(tf, entry.config)(**{**(SMALL if entry.model else {}), **entry.fields, **changes})


def tiny_model(family, attention=None, **changes):
    """A random model; `attention` is the implementation, Transformers' own choice by default."""
    torch.manual_seed(1)
    config = tiny_config(family, **changes)
    if attention is not None:
        config._attn_implementation = attention
    return getattr(tf, REGISTRY[family].model)(config).eval()


def random_ids(rows, length, seed=0):
    return torch.randint(1, 120, (rows, length), generator=torch.Generator().manual_seed(seed))
