"""Bins of consecutive tokens: where each token and each slot goes. Index arithmetic, no kernel.

All bins of all rows and heads are compressed as one batch (design of arXiv 2602.10056's COMPRESSKV), so
ragged bins are laid out in a rectangle with unused places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wildcat_kv.budget import split_evenly


@dataclass(frozen=True)
class BinLayout:
    """Which columns form which bin, and which slots the bins fill. Built on the host, once a fold.

    Tokens and slots are right-aligned: a row with fewer than the others starts with unused columns. The
    first dimension is 1 where all rows are alike.

    Attributes:
        column: int64 (rows, bins, t), the column of each bin's tokens; the last one where unused.
        used: bool (rows, bins, t).
        size: int64 (rows, bins), tokens of each bin.
        rank: int64 (rows, bins), slots of each bin.
        slot: int64 (rows, c), index into the flattened (bins, bin_rank) of each slot; 0 where unused.
        slot_used: bool (rows, c).
        bin_rank: the largest rank of a bin, r.
        lossless: whether no bin has more tokens than slots.
    """

    column: Tensor
    used: Tensor
    size: Tensor
    rank: Tensor
    slot: Tensor
    slot_used: Tensor
    bin_rank: int
    lossless: bool

    @staticmethod
    def build(
        columns: int,
        lengths: Sequence[int],
        ranks: Sequence[int],
        bins: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> BinLayout:
        """Lay out rows of `lengths` tokens, `ranks` slots and `bins` bins, in `columns` columns."""
        rows = list(zip(lengths, ranks, bins, strict=True))
        if len(set(rows)) == 1:
            rows = rows[:1]
        size = _rectangle([split_evenly(length, count) for length, _, count in rows])
        rank = _rectangle([split_evenly(slots, count) for _, slots, count in rows])
        length = torch.tensor([row[0] for row in rows])
        total = torch.tensor([row[1] for row in rows])
        bin_rank = int(rank.max())

        start = (columns - length).unsqueeze(-1) + size.cumsum(-1) - size
        offset = torch.arange(int(size.max()))
        used = offset < size.unsqueeze(-1)
        column = torch.where(used, start.unsqueeze(-1) + offset, columns - 1)

        # Close up the slots of ragged bins, and push them to the right.
        filled = (torch.arange(bin_rank) < rank.unsqueeze(-1)).flatten(1)
        slot = filled.to(torch.int8).argsort(dim=-1, stable=True)[:, -int(total.max()) :]
        slot_used = filled.gather(-1, slot)

        column, used, size_d, rank_d, slot, slot_used = (
            tensor.to(device, non_blocking=True)
            for tensor in (column, used, size, rank, torch.where(slot_used, slot, 0), slot_used)
        )
        return BinLayout(column, used, size_d, rank_d, slot, slot_used, bin_rank, lossless=bool((size <= rank).all()))

    def gather(self, tokens: Tensor) -> Tensor:
        """Tokens (rows, heads, n, ...) into bins (rows, heads, bins, t, ...), copied."""
        return take_columns(tokens, self.column.flatten(1).unsqueeze(1)).unflatten(2, self.column.shape[1:])

    def collect(self, slots: Tensor) -> Tensor:
        """Slots of the bins (rows, heads, bins, r, ...) into one line (rows, heads, c, ...)."""
        return take_columns(slots.flatten(2, 3), self.slot.unsqueeze(1))


def take_columns(tensor: Tensor, index: Tensor) -> Tensor:
    """Entries `index` int64 (rows or 1, heads or 1, k) of a tensor (rows, heads, n, ...), copied."""
    rows, heads = (torch.arange(size, device=tensor.device) for size in tensor.shape[:2])
    return tensor[rows[:, None, None], heads[:, None], index]


def _rectangle(rows: list[list[int]]) -> Tensor:
    """Rows of different lengths, filled up with zeros."""
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])
