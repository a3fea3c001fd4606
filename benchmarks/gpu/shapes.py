"""Shapes of the models that are measured, and the sizes of what is measured on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers

LEAST_POSITIONS = 2**20


@dataclass(frozen=True)
class Shape:
    """A decoder, by its sizes; the weights are random.

    Attributes:
        name: name of the model that has this shape.
        family: prefix of its classes in Transformers; a real model's own class is taken instead.
        hidden: channels of a token.
        inner: channels within the feed-forward part.
        heads: query heads.
        kv_heads: key heads.
        head_dim: channels of a head.
        layers: layers of the whole model.
        vocabulary: number of tokens.
        theta: base of the rotary frequencies.
    """

    name: str
    family: str
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocabulary: int
    theta: float

    @staticmethod
    def of(config: Any, name: str) -> Shape:
        """Read the sizes of a real model's config."""
        config = config.get_text_config(decoder=True)
        return Shape(
            name,
            "Llama",
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            config.num_hidden_layers,
            config.vocab_size,
            1e4,
        )

    def config(self, layers: int) -> Any:
        """Make the config of a model with this many layers."""
        config = getattr(transformers, f"{self.family}Config")(
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            num_hidden_layers=layers,
            vocab_size=self.vocabulary,
            max_position_embeddings=LEAST_POSITIONS,
            rope_parameters={"rope_type": "default", "rope_theta": self.theta},
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
        config._attn_implementation = "sdpa"
        return config

    def model(self, layers: int, device: torch.device, dtype: torch.dtype) -> Any:
        """Build a model of this many layers on the device, from random weights."""
        before = torch.get_default_dtype()
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                model = getattr(transformers, f"{self.family}ForCausalLM")(self.config(layers))
        finally:
            torch.set_default_dtype(before)
        return model.eval().requires_grad_(False)


LLAMA = Shape("Llama-3.1-8B", "Llama", 4096, 14336, 32, 8, 128, 32, 128256, 5e5)
QWEN = Shape("Qwen2.5-7B", "Qwen2", 3584, 18944, 28, 4, 128, 28, 152064, 1e6)
TINY = Shape("tiny", "Llama", 64, 96, 4, 2, 16, 2, 512, 1e4)


@dataclass(frozen=True)
class Sizes:
    """Lengths of texts, rows of batches and shares kept; the first of each is measured first.

    Attributes:
        prefill: prompts.
        decoding: contexts.
        kept: shares of the tokens.
        rows: batches.
        kernels: rows and entries that a token attends to.
        folds: tokens of one layer.
        attention: tokens of attention of all to all.
        batch: tokens of the texts of the largest batch.
        most_rows: rows at which the search for the largest batch ends.
    """

    prefill: tuple[int, ...]
    decoding: tuple[int, ...]
    kept: tuple[float, ...]
    rows: tuple[int, ...]
    kernels: tuple[tuple[int, int], ...]
    folds: tuple[int, ...]
    attention: tuple[int, ...]
    batch: int
    most_rows: int


FULL = Sizes(
    prefill=(32768, 8192, 131072),
    decoding=(32768, 131072),
    kept=(0.25, 0.0625),
    rows=(1, 8, 32),
    kernels=((1, 8192), (1, 32768), (8, 8192), (32, 8192)),
    folds=(4096, 8192, 16384, 32768, 65536, 131072, 262144, 524288),
    attention=(4096, 16384, 32768, 65536, 131072),
    batch=32768,
    most_rows=4096,
)
SMALL = Sizes(
    prefill=(600, 300),
    decoding=(400,),
    kept=(0.25, 0.125),
    rows=(1, 2),
    kernels=((1, 256), (2, 128)),
    folds=(256, 512),
    attention=(256, 512),
    batch=300,
    most_rows=4,
)
