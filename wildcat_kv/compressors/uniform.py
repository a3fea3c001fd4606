"""Uniform: tokens drawn at random, without weights. The floor that every method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from wildcat_kv.compressors.base import KVBlock
from wildcat_kv.compressors.keyed_noise import keyed_noise
from wildcat_kv.compressors.scorer import Scorer


@dataclass(frozen=True)
class Uniform(Scorer):
    """Keep tokens at random.

    Drawn uniformly, anew for every layer and head. Needs nothing, costs nothing. The "Uniform" baseline of arXiv
    2602.10056.

    Attributes:
        seed: seed of the draw.
    """

    paper: ClassVar[str] = "arXiv 2602.10056"

    seed: int = 0

    @override
    def score(self, block: KVBlock) -> Tensor:
        return keyed_noise(block, self.seed, block.keys.shape[2])
