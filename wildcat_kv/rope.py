"""How a model rotates queries and keys by their positions.

Taken from the family's own modeling file, so that scaled, partial and interleaved rotations are what the model does.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel

from wildcat_kv.rotation import Rotation

# Families whose full-attention layers have no positions: always, or where other layers have windows.
_NO_POSITIONS = ("cohere2",)
_NO_POSITIONS_BESIDE_WINDOWS = ("exaone4", "exaone_moe", "kolibri1")
# Some of their full-attention layers have positions and some not, by a rule of their own.
_UNKNOWN = ("cohere2_moe",)


def rotation_of(config: Any, layer_idx: int) -> Rotation:
    """The rotation of layer `layer_idx` of the decoder with this config.

    Raises:
        ValueError: the family rotates in a way that is not understood.
    """
    if _skips_positions(config, layer_idx):
        return Rotation(None, None)
    try:
        if config.model_type in _UNKNOWN:
            raise NotImplementedError("layers differ by a rule of their own")
        module: Any = sys.modules[AutoModel._model_mapping[type(config)].__module__]
        names = [name for name in vars(module) if name.endswith("RotaryEmbedding") and "Vision" not in name]
        if not names:  # learned positions
            return Rotation(None, None)
        (name,) = names
        rotation = _rotation(getattr(module, name)(config), module.apply_rotary_pos_emb, config, layer_idx)
    except Exception as error:
        raise ValueError(
            f"config={type(config).__name__}: the rotary positions of this family are not understood "
            f"({type(error).__name__}: {error}); use a method that needs no positions, such as snapkv"
        ) from None
    return rotation


def _rotation(rotary: Any, apply: Any, config: Any, layer_idx: int) -> Rotation:
    """The rotation by a family's own `rotary` module and `apply` function."""
    by_type = [config.layer_types[layer_idx]] if "layer_type" in inspect.signature(rotary.forward).parameters else []
    pairs = "k" in inspect.signature(apply).parameters  # takes queries and keys at once
    grids = hasattr(rotary, "mrope_section")  # positions in time, height and width, which are one in text

    def both(positions: Tensor) -> tuple[Tensor, Tensor]:
        device = positions.device
        positions = positions.expand(3, -1, -1) if grids else positions
        return rotary.to(device)(torch.zeros(1, device=device), positions, *by_type)

    # Some have one cosine for a pair of channels, instead of one for each.
    frequencies = getattr(rotary, "_".join([*by_type, "inv_freq"]))
    half = both(torch.tensor([[0]]))[0].shape[-1] == frequencies.shape[-1]

    def angles(positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = both(positions)
        return (cos.repeat(1, 1, 2), sin.repeat(1, 1, 2)) if half else (cos, sin)

    def turn(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if half:
            cos, sin = cos[..., : cos.shape[-1] // 2], sin[..., : sin.shape[-1] // 2]
        # As queries, beside no keys.
        return apply(vectors, vectors[:, :0], cos, sin)[0] if pairs else apply(vectors, cos, sin)

    rotation, position = Rotation(angles, turn), torch.tensor([[7]])
    vectors = torch.linspace(1, 2, angles(position)[0].shape[-1]).view(1, 1, 1, -1)
    torch.testing.assert_close(rotation.average(rotation.back(vectors, position), position), vectors)
    return rotation


def _skips_positions(config: Any, layer_idx: int) -> bool:
    """Whether the layer, one with full attention, has no rotary positions where others of its family have them."""
    model_type = getattr(config, "model_type", None)
    if model_type in _NO_POSITIONS_BESIDE_WINDOWS:
        return bool(config.sliding_window is not None)
    layers: Any = getattr(config, "no_rope_layers", None)  # 1 stands for a layer that has them
    return (
        model_type in _NO_POSITIONS
        or getattr(config, "position_embedding_type", "rope") != "rope"
        or (bool(layers) and not layers[layer_idx])
    )
