"""Random numbers keyed by what a row has read: equal rows stay equal."""

from __future__ import annotations

import torch
from torch import Tensor

from wildcat_kv.compressors.base import KVBlock
from wildcat_kv.coreset.noise import uniform_noise


def keyed_noise(block: KVBlock, seed: int, columns: int, *draw: int) -> Tensor:
    """Draw uniform noise for the heads of a block.

    It is the same for all rows, and new for every layer, fold and head.

    Args:
        block: entries.
        seed: any integer in [0, 2**63).
        columns: numbers of each head.
        *draw: numbers that tell several draws of one fold apart.

    Returns:
        float32 (rows, heads, columns), in (0, 1).
    """
    (rows, heads), device = block.keys.shape[:2], block.keys.device
    fold = (torch.full((1, 1, 1), number, device=device) for number in (block.layer_index, block.seen, *draw))
    head = torch.arange(heads, device=device).view(-1, 1)
    return uniform_noise(seed, *fold, head, torch.arange(columns, device=device)).expand(rows, heads, columns)
