"""How a model rotates queries and keys by their positions.

Taken from the family's own modeling file, so that scaled, partial and interleaved rotations are what the model does.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel

from wildcat_kv.rotation import Rotation

# Families whose full-attention layers have no positions.
_NO_POSITIONS = ("cohere2", "exaone4")


def rotation_of(config: Any, layer_idx: int) -> Rotation:
    """The rotation of layer `layer_idx` of the decoder with this config.

    Raises:
        ValueError: the family rotates in a way that is not understood.
    """
    if getattr(config, "model_type", None) in _NO_POSITIONS or _skips_positions(config, layer_idx):
        return Rotation(None, None)
    try:
        module = sys.modules[AutoModel._model_mapping[type(config)].__module__]
        found = [value for name, value in vars(module).items() if name.endswith("RotaryEmbedding")]
        if not found:  # learned positions
            return Rotation(None, None)
        rotary, apply = found[0](config), module.apply_rotary_pos_emb
        types = getattr(config, "layer_types", None)
        by_type = [types[layer_idx]] if types and "layer_type" in rotary.forward.__code__.co_varnames else []

        def angles(positions: Tensor) -> tuple[Tensor, Tensor]:
            device = positions.device
            cos, sin = rotary.to(device)(torch.zeros(1, device=device), positions, *by_type)
            return cos, sin

        def turn(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            return apply(vectors, vectors, cos, sin)[0]

        rotation = Rotation(angles, turn)
        rotation.back(torch.ones(1, 1, 2, _head_dim(config)), torch.tensor([[0, 1]]))
    except Exception as error:
        raise ValueError(
            f"config={type(config).__name__}: the rotary positions of this family are not understood "
            f"({type(error).__name__}: {error}); use a method that needs no positions, such as snapkv"
        ) from None
    return rotation


def _skips_positions(config: Any, layer_idx: int) -> bool:
    """Whether the config says that this layer has no rotary positions; 1 stands for a layer that has."""
    layers = getattr(config, "no_rope_layers", None)
    return bool(layers) and not layers[layer_idx]


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
