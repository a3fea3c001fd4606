"""PyramidKV: SnapKV with more room in the lower layers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

from typing_extensions import override

from wildcat_kv.compressors.base import Compressed, KVBlock
from wildcat_kv.compressors.scorer import keep_best
from wildcat_kv.compressors.snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV with more slots in the lower layers.

    They fall linearly from the first layer to the last.

    Needs what SnapKV needs. The layers' slots add up to what equal layers would have; sinks and window, which every
    layer keeps, are not part of the pyramid. The reference library rounds every layer by itself, counts its window into
    the pyramid, and gives it up for equal layers where the last one would get less than the window.

    Attributes:
        window: queries to observe, as in SnapKV.
        kernel: positions to average over, as in SnapKV.
        beta: average slots over those of the last layer; 20 in the reference library and the authors' code.

    Source: Cai et al., arXiv 2406.02069.
    """

    paper: ClassVar[str] = "arXiv 2406.02069"

    beta: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 1:
            raise ValueError(f"beta={self.beta} must be at least 1; 1 gives all layers the same")

    @override
    def expect_slots(self, place: int, sharing: Sequence[int], heads: int, items: int, rank: int) -> list[int]:
        return [min(items, self._slots(place, sharing, items, rank))] * heads

    def _slots(self, place: int, sharing: Sequence[int], tokens: int, rank: int) -> int:
        """Count the slots of the layer at `place`, for items that stand for so many tokens."""
        return pyramid(rank, tokens, len(sharing), self.beta)[sharing.index(place)]

    @override
    def compress(self, block: KVBlock, rank: int) -> Compressed:
        slots = min(block.items, self._slots(block.layer_index, block.sharing, block.item_tokens, rank))
        return replace(keep_best(block, self.scores(block), slots), columns=[slots] * block.keys.shape[0])


def pyramid(rank: int, length: int, layers: int, beta: int) -> list[int]:
    """Count the slots of each layer, which fall linearly.

    They sum to `rank * layers`, and no layer gets more than `length`.

    Example:
        >>> pyramid(100, 1000, 4, 20)
        [195, 132, 68, 5]
    """
    if layers == 1:
        return [rank]
    highest = min(2 * rank - Fraction(rank, beta), Fraction(max(length, rank)))
    step = (2 * highest - 2 * rank) / (layers - 1)
    # Sums rounded, not the parts, so that nothing is lost or won.
    sums = [round(highest * count - step * count * (count - 1) / 2) for count in range(layers + 1)]
    return [after - before for before, after in itertools.pairwise(sums)]
