"""Smallest and largest value of each channel, which clip the weighted attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wildcat_kv.cache.budget import Row
from wildcat_kv.coreset.launching import is_launched


@dataclass(frozen=True)
class ValueRange:
    """A box around values, channel by channel.

    Where it is empty, `lowest` is above `highest`.

    Minimum and maximum are exact, so boxes joined in any order are the same bit for bit.

    Attributes:
        lowest: (rows, kv_heads, 1, d_v), in the dtype of the values.
        highest: (rows, kv_heads, 1, d_v), in the dtype of the values.
    """

    lowest: Tensor
    highest: Tensor

    @staticmethod
    def of(values: Tensor, valid: Tensor | None = None) -> ValueRange:
        """Find the box around values (rows, kv_heads, n, d_v).

        `valid` is bool (rows, 1 or kv_heads, n), all by default.
        """
        limit = torch.finfo(values.dtype)
        if not values.shape[-2]:
            shape = (*values.shape[:-2], 1, values.shape[-1])
            return ValueRange(values.new_full(shape, limit.max), values.new_full(shape, limit.min))
        if valid is None and is_launched(values.device):
            return ValueRange(*values.aminmax(dim=-2, keepdim=True))
        if valid is None:
            return ValueRange(values.amin(-2, keepdim=True), values.amax(-2, keepdim=True))
        hidden = ~valid.unsqueeze(-1)
        return ValueRange(
            values.masked_fill(hidden, limit.max).amin(-2, keepdim=True),
            values.masked_fill(hidden, limit.min).amax(-2, keepdim=True),
        )

    def join(self, other: ValueRange) -> ValueRange:
        """Find the box around both."""
        return ValueRange(torch.minimum(self.lowest, other.lowest), torch.maximum(self.highest, other.highest))

    def extend(self, values: Tensor, valid: Tensor | None = None) -> ValueRange:
        """Find the box around this one and new values; arguments as in `of`."""
        if values.shape[-2] > 1:
            return self.join(ValueRange.of(values, valid))
        if valid is None:
            return ValueRange(torch.minimum(self.lowest, values), torch.maximum(self.highest, values))
        # One token after another: no pass over an axis of length 1, and a hidden one is no news.
        lowest = torch.where(valid.unsqueeze(-1), values, self.lowest)
        highest = torch.where(valid.unsqueeze(-1), values, self.highest)
        return ValueRange(torch.minimum(self.lowest, lowest), torch.maximum(self.highest, highest))

    def unbounded_where_empty(self, other: ValueRange) -> ValueRange:
        """This box, but without any bound where `other` is empty."""
        limit, empty = torch.finfo(self.lowest.dtype), other.lowest > other.highest
        return ValueRange(self.lowest.masked_fill(empty, limit.min), self.highest.masked_fill(empty, limit.max))

    def squared_norm(self) -> Tensor:
        """Compute s^2, the largest squared norm of a value within the box.

        It is float32 (rows, kv_heads), 0 where the box is empty.
        """
        largest = torch.maximum(self.lowest.to(torch.float32).square(), self.highest.to(torch.float32).square())
        return largest.masked_fill(self.lowest > self.highest, 0.0).sum((-2, -1))

    def rows(self, index: Tensor) -> ValueRange:
        """Take rows (k,) of the batch, copied."""
        index = index.to(self.lowest.device)
        return ValueRange(self.lowest.index_select(0, index), self.highest.index_select(0, index))

    def to(self, device: torch.device) -> ValueRange:
        """On another device."""
        return ValueRange(self.lowest.to(device), self.highest.to(device))

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Give the two tensors."""
        return self.lowest, self.highest


def range_of(values: Tensor, spans: Sequence[tuple[int, int]]) -> ValueRange:
    """Find the box around values of exact tokens.

    The values are (rows, kv_heads, n, d_v), in columns [start, stop) of each row.
    """
    if len(set(spans)) == 1:
        return ValueRange.of(values[:, :, slice(*spans[0])])
    start, stop = torch.tensor(spans).to(values.device, non_blocking=True).unsqueeze(-1).unbind(1)
    place = torch.arange(values.shape[2], device=values.device)
    return ValueRange.of(values, ((place >= start) & (place < stop)).unsqueeze(1))


def exact_range(values: Tensor, rows: Sequence[Row]) -> ValueRange:
    """Find the box around the exact tokens' values in right-aligned rows.

    The values are (rows, kv_heads, n, d_v).
    """
    end = values.shape[2]
    newest = range_of(values, [(end - row.exact, end) for row in rows])
    if not any(row.sink for row in rows):
        return newest
    return newest.join(range_of(values, [(end - row.stored, end - row.stored + row.sink) for row in rows]))
