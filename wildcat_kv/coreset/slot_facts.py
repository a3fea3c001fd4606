"""Facts of slots that the host must know, from one read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wildcat_kv.coreset.wtdattn import WeightSigns


class SlotFacts(NamedTuple):
    """Counts and bounds of the slots of each row and head.

    Attributes:
        counts: valid slots, rows of heads.
        least: smallest weight of a valid slot, rows of heads; 1 where there is none.
        most: largest weight of a valid slot, rows of heads; 1 where there is none.
    """

    counts: list[list[int]]
    least: list[list[float]]
    most: list[list[float]]

    @staticmethod
    def read(weights: Tensor, valid: Tensor) -> SlotFacts:
        """Read the facts of slots (rows, heads, c): the host waits once."""
        rows, heads, width = valid.shape
        if not width:
            ones = [[1.0] * heads for _ in range(rows)]
            return SlotFacts([[0] * heads for _ in range(rows)], ones, ones)
        least, most = torch.where(valid, weights, 1.0).aminmax(dim=-1)
        # Counts are exact in float32 up to 2^24.
        numbers = torch.stack((valid.sum(-1, dtype=torch.float32), least, most)).tolist()
        return SlotFacts([[int(count) for count in row] for row in numbers[0]], *numbers[1:])

    def signs(self, places: Sequence[int], *, padded: bool, exact: bool) -> WeightSigns:
        """Tell the signs of the weights of some heads, side by side with others.

        Args:
            places: heads, each as row * heads + head.
            padded: True if there is padding, too.
            exact: True if there are exact tokens, too.
        """
        heads = len(self.counts[0])
        at = [divmod(place, heads) for place in places if self.counts[place // heads][place % heads]]
        # As `WeightSigns.bounds` counts them: padding weighs 2.
        others = [1.0] * exact + [2.0] * padded
        least = [self.least[row][head] for row, head in at] + others
        most = [self.most[row][head] for row, head in at] + others
        return WeightSigns.within(min(least), max(most)) if least else WeightSigns.NONE
