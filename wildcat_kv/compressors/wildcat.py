"""WildCat: bins of tokens into Nystrom-weighted pivots (arXiv 2602.10056)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from wildcat_kv.compressors.base import Compressed, Compressor, KVBlock
from wildcat_kv.config import WildCatConfig
from wildcat_kv.coreset.binned import BLOCKED_RANK
from wildcat_kv.coreset.bins import BinLayout
from wildcat_kv.coreset.compresskv import Coreset, compress_bins
from wildcat_kv.coreset.noise import gumbel_rows, uniform_rows
from wildcat_kv.coreset.rpnys import Weights
from wildcat_kv.coreset.rpnys_blocked import BLOCK
from wildcat_kv.coreset.temperature import Temperature


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

    def compress(self, block: KVBlock, rank: int) -> Compressed:
        """See `Compressor`."""
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
        bins = max(1, -(-rank // self.bin_rank))
        layout = BinLayout.build(block.items, [block.items], [rank], [bins], block.keys.device)
        return compress_bins(
            block.slice_items(block.keys),
            block.slice_items(block.values),
            layout,
            _Draws(block, layout, self.seed),
            blocked=self.bin_rank >= BLOCKED_RANK,
            scale=block.scale,
            weights=None if block.weights is None else block.slice_items(block.weights),
            valid=valid,
            value_bound=block.value_bound,
            temperature=self.temperature,
            weighting=self.weights,
        )


class _Draws:
    """Noise keyed by what a row is by itself, so that padding and the rest of the batch change nothing."""

    def __init__(self, block: KVBlock, layout: BinLayout, seed: int) -> None:
        self._layout, self._seed, self._device, self._rows = layout, seed, block.keys.device, block.keys.shape[0]
        keyed_by = (block.layer_index, block.seen)
        self._fold = tuple(torch.full((1, 1, 1, 1), number, device=self._device) for number in keyed_by)

    def gumbel(self, heads: range, bins: range) -> Tensor:
        """See `Draws`."""
        steps = torch.arange(self._layout.bin_rank, device=self._device)
        return self._alike(gumbel_rows(self._seed, *self._counters(heads, bins), steps, columns=self._layout.longest))

    def uniform(self, heads: range, bins: range, turn: int) -> Tensor:
        """See `Draws`."""
        words = torch.arange(3 * turn, 3 * turn + 3, device=self._device)
        return self._alike(uniform_rows(self._seed, *self._counters(heads, bins), words, columns=BLOCK))

    def _counters(self, heads: range, bins: range) -> tuple[Tensor, ...]:
        head = torch.arange(heads.start, heads.stop, device=self._device).view(-1, 1, 1)
        place = torch.arange(bins.start, bins.stop, device=self._device).view(-1, 1)
        return *self._fold, head, place

    def _alike(self, noise: Tensor) -> Tensor:
        """The same noise (1, ...) for all rows: they have read equally much."""
        return noise.expand(self._rows, *noise.shape[1:])
