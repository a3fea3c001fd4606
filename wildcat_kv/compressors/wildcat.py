"""WildCat: bins of tokens into Nystrom-weighted pivots (arXiv 2602.10056)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from typing_extensions import Self

from wildcat_kv.bins import BinLayout
from wildcat_kv.compress import Coreset, compress_bins
from wildcat_kv.compressors.base import Compressor, KVBlock
from wildcat_kv.config import Temperature, Weights, WildCatConfig
from wildcat_kv.noise import gumbel_noise


@dataclass(frozen=True)
class WildCat(Compressor):
    """Draw a few keys of each bin; the others live on in them.

    Randomly pivoted Cholesky draws them, Nystrom weights spread the values and weights of all tokens over them.

    Needs keys and values only. Costs bin_rank sequential steps a fold, all bins, heads and rows at once.

    Attributes:
        bin_rank: slots of a bin; the published protocol has 12.
        temperature: rule for tau, see `temperature.py`.
        weights: "nystrom" (signed) or "clipped".
        seed: of the pivots.

    Source: Schröder and Mackey, arXiv 2602.10056, COMPRESSKV.
    """

    paper: ClassVar[str] = "arXiv 2602.10056"

    bin_rank: int = 12
    temperature: Temperature = "released"
    weights: Weights = "nystrom"
    seed: int = 0

    @classmethod
    def of(cls, settings: WildCatConfig) -> Self:
        """The method with the parameters that `settings` give it."""
        return cls(settings.bin_rank, settings.temperature, settings.weights, settings.seed)

    def compress(self, block: KVBlock, budget: Sequence[int]) -> Coreset:
        """See `Compressor`."""
        device = block.keys.device
        bins = [max(1, -(-rank // self.bin_rank)) for rank in budget]
        keys, values, valid = (block.items(tensor) for tensor in (block.keys, block.values, block.valid))
        layout = BinLayout.build(keys.shape[2], block.lengths, budget, bins, device)

        # Keyed by what a row is by itself, so that padding and the rest of the batch change nothing.
        places = layout.used.shape[-1]
        noise = gumbel_noise(
            self.seed,
            torch.full((1, 1, 1, 1, 1), block.layer_index, device=device),
            torch.tensor(block.seen).to(device, non_blocking=True).view(-1, 1, 1, 1, 1),
            torch.arange(keys.shape[1], device=device).view(-1, 1, 1, 1),
            torch.arange(layout.used.shape[1], device=device).view(-1, 1, 1),
            torch.arange(layout.bin_rank, device=device).view(-1, 1),
            torch.arange(places, device=device),
        )
        return compress_bins(
            keys,
            values,
            layout,
            noise,
            scale=block.scale,
            weights=None if block.weights is None else block.items(block.weights),
            valid=valid,
            value_bound=block.value_bound,
            temperature=self.temperature,
            weighting=self.weights,
        )
