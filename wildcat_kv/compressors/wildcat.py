"""WildCat: bins of tokens into Nystrom-weighted pivots (arXiv 2602.10056)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import Self, override

from wildcat_kv.compressors.base import Compressed, Compressor, KVBlock
from wildcat_kv.config import WildCatConfig
from wildcat_kv.coreset.binned import BLOCKED_RANK
from wildcat_kv.coreset.bins import BinLayout
from wildcat_kv.coreset.compresskv import Coreset, compress_bins
from wildcat_kv.coreset.draws import KeyedDraws
from wildcat_kv.coreset.rpnys import Weights
from wildcat_kv.coreset.temperature import Temperature
from wildcat_kv.coreset.tokens import KernelOptions, WeightedTokens


@dataclass(frozen=True)
class WildCat(Compressor):
    """Draw a few keys of each bin; the others live on in them.

    Randomly pivoted Cholesky draws them, Nystrom weights spread the values and weights of all tokens over them.

    Needs keys and values only. Costs bin_rank sequential steps a fold, all bins, heads and rows at once; large ranks
    are drawn in blocks.

    Attributes:
        bin_rank: slots of a bin; the published protocol has 12.
        temperature: rule for tau, see `temperature.py`.
        weights: "nystrom" (signed) or "clipped".
        seed: seed of the pivots.

    Source: Schröder and Mackey, arXiv 2602.10056, COMPRESSKV.
    """

    paper: ClassVar[str] = "arXiv 2602.10056"

    bin_rank: int = 12
    temperature: Temperature = "released"
    weights: Weights = "nystrom"
    seed: int = 0

    @classmethod
    def of(cls, settings: WildCatConfig) -> Self:
        """Build the method with the parameters that `settings` give it."""
        return cls(settings.bin_rank, settings.temperature, settings.weights, settings.seed)

    @override
    def compress(self, block: KVBlock, rank: int) -> Compressed:
        # Exact tokens are never padding.
        valid = None if block.weights is None else block.slice_items(block.valid)
        coreset, _ = self.compress_some(block, rank, valid)
        return Compressed(coreset)

    def compress_some(self, block: KVBlock, rank: int, valid: Tensor | None) -> tuple[Coreset, Tensor]:
        """Compress some of the items to `rank` slots.

        Args:
            block: entries.
            rank: slots.
            valid: bool (rows, heads, items), those that take part; None for all.

        Returns:
            The slots, and int64 (rows, heads, rank), the item whose key each of them has.
        """
        device, bins = block.keys.device, max(1, -(-rank // self.bin_rank))
        layout = BinLayout.build(block.items, rank, bins, device)
        keys, values = block.slice_items(block.keys), block.slice_items(block.values)
        weights = None if block.weights is None else block.slice_items(block.weights)
        return compress_bins(
            WeightedTokens(keys, values, weights, valid, block.value_bound),
            layout,
            KeyedDraws(layout, self.seed, block.layer_index, block.seen, keys.shape[0], device),
            KernelOptions(
                scale=block.scale,
                temperature=self.temperature,
                weights_rule=self.weights,
                blocked=self.bin_rank >= BLOCKED_RANK,
            ),
        )
