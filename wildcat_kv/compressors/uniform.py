"""Uniform: tokens drawn at random, without weights. The floor that every method must beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from wildcat_kv.bins import BinLayout
from wildcat_kv.compress import Coreset, take_pivots
from wildcat_kv.compressors.base import KVBlock
from wildcat_kv.noise import gumbel_noise


@dataclass(frozen=True)
class Uniform:
    """Keep a uniformly random subset of the tokens, drawn anew for every layer and head.

    Needs nothing, costs nothing. The "Uniform" baseline of arXiv 2602.10056.

    Attributes:
        seed: of the draw.
    """

    seed: int = 0

    def compress(self, block: KVBlock, budget: Sequence[int]) -> Coreset:
        """See `Compressor`."""
        device = block.keys.device
        layout = BinLayout.build(block.keys.shape[2], block.lengths, budget, [1] * len(budget), device)
        used = layout.used.unsqueeze(1) & layout.gather(block.valid)
        noise = gumbel_noise(
            self.seed,
            torch.full((1, 1, 1, 1), block.layer_index, device=device),
            torch.tensor(block.seen).to(device, non_blocking=True).view(-1, 1, 1, 1),
            torch.arange(block.keys.shape[1], device=device).view(-1, 1, 1),
            torch.arange(used.shape[-1], device=device),
        )
        order = noise.expand(used.shape).masked_fill(~used, -torch.inf).argsort(-1, descending=True)
        pivots = order[..., : layout.bin_rank]
        chosen = used.gather(-1, pivots) & (
            torch.arange(layout.bin_rank, device=device) < layout.rank[:, None, :, None]
        )
        return take_pivots(block.keys, block.values, block.weights, layout, pivots, chosen)
