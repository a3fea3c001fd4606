"""Uniform: tokens drawn at random, without weights. The floor that every method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from wildcat_kv.compressors.base import KVBlock
from wildcat_kv.compressors.scorer import Scorer
from wildcat_kv.coreset.noise import gumbel_noise


@dataclass(frozen=True)
class Uniform(Scorer):
    """Keep tokens at random.

    Drawn uniformly, anew for every layer and head. Needs nothing, costs nothing. The "Uniform" baseline of arXiv
    2602.10056.

    Attributes:
        seed: of the draw.
    """

    paper: ClassVar[str] = "arXiv 2602.10056"

    seed: int = 0

    def score(self, block: KVBlock) -> Tensor:
        """See `Scorer`."""
        heads, n = block.keys.shape[1:3]
        device = block.keys.device
        noise = gumbel_noise(
            self.seed,
            torch.full((1, 1, 1), block.layer_index, device=device),
            torch.full((1, 1, 1), block.seen, device=device),
            torch.arange(heads, device=device).view(-1, 1),
            torch.arange(n, device=device),
        )
        return noise.expand(block.valid.shape)
