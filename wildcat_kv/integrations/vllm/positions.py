"""Positions of a context in an engine: its entries become a prefix of r tokens.

Attention sees differences of rotary positions alone. With all keys moved by r - N positions, the tokens after a
compressed text of N tokens are the tokens after a prefix of r.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wildcat_kv.compressors.rotation import Rotation
from wildcat_kv.models.rope import rotation_limit, rotations_of


def fixed_rotations(config: Any, layers: Sequence[int]) -> dict[int, Rotation]:
    """Find the rotation of each layer; its frequencies do not depend on the length of the text.

    Args:
        config: config of the decoder.
        layers: indices of its full-attention layers.

    Raises:
        ValueError: positions that are not understood, that are learned, or whose frequencies change.
    """
    rotations = rotations_of(config, layers)
    name = type(config).__name__
    if not any(rotation.rotates for rotation in rotations.values()):
        raise ValueError(
            f"config={name}: no layer has rotary positions, and others cannot be moved; ask the context through "
            "Transformers"
        )
    if any(rotation.grids for rotation in rotations.values()):
        raise ValueError(
            f"config={name}: positions in time, height and width cannot be moved; ask the context through Transformers"
        )
    if (limit := rotation_limit(config, rotations)) is not None:
        raise ValueError(
            f"config={name}: its rotary frequencies change at {limit} tokens, so keys cannot be moved; ask the context "
            "through Transformers"
        )
    return rotations


def moved(vectors: Tensor, rotation: Rotation, by: int) -> Tensor:
    """Move keys or queries (heads, n, d) by a number of positions, in float32, and round once."""
    where = torch.full((1, 1), by, dtype=torch.int64, device=vectors.device)
    return rotation.forward(vectors.float().unsqueeze(0), where).squeeze(0).to(vectors.dtype)
